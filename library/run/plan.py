"""The plan of a run, before anything large is loaded: options, data, model headers. Most mistakes are found here."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import log
from library.config.data.dataset_config import DatasetSpec, is_validated, load_datasets
from library.config.data.masks import check_masks
from library.config.data.shares import check_shares
from library.config.idle import warn_of_idle_options
from library.config.options import NetworkOptions, Options, OutputOptions
from library.config.options.validation import check_validation
from library.config.registry import Arguments
from library.data.captions import refuse_text_cache_of_changing_captions, warn_of_captions_options
from library.data.views import refuse_latent_cache_of_changing_images
from library.errors import UserError, nearest_path
from library.models.opening import open_family
from library.parallel import together
from library.record.metadata import check_user_metadata
from library.record.trackers import TrackerPlan
from library.run import slider, word
from library.run.measured import MeasuredFolder, MeasuredSet, measured_folders, measured_sets
from library.run.trackers import plan_trackers
from library.sampling.prompts import SampleTimes, plan_samples, warn_of_idle_flags, with_samplers_of
from library.training.state import State
from library.training.state import find as find_state
from networks import kinds

if TYPE_CHECKING:
    from library.config.data.slider_prompts import Setting
    from library.data.prepared import Prepared
    from library.models.family import ModelFamily
    from library.optimizers.create import OptimizerChoice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Options that fit together, data that can be read, a model that exists.

    `sets`: folders that are measured beside `prepared.validation`. `parameters`: the numbers that the network trains;
    None for one of another package. `settings`: of a slider, which has no images.
    """

    options: Options
    datasets: tuple[DatasetSpec, ...]
    prepared: Prepared
    sets: tuple[MeasuredSet, ...]
    family: ModelFamily
    choice: OptimizerChoice
    network_arguments: Arguments
    seed: int
    parameters: int | None
    trackers: TrackerPlan
    samples: SampleTimes | None
    started_at: float
    session_id: int
    resume: State | None = None
    settings: tuple[Setting, ...] = ()


def make_plan(options: Options, *, families: tuple[str, ...] = ()) -> Plan:
    """Check everything that can be checked cheaply, the cheapest first. Raises UserError.

    families: those of which the base model has to be, as in `library.models.FAMILIES`.
    """
    settings = slider.settings_of(options)
    datasets = slider.datasets_of(settings, options) if settings else load_datasets(options)
    datasets = word.with_templates(datasets, options)
    folders = measured_folders(options, datasets)
    check_data_options(options, datasets)
    _warn_of_unused_rates(options)
    arguments = _network_arguments(options)
    _check_metadata(options.output)
    _refuse_missing_weights("network_weights", options.network.network_weights)
    _refuse_missing_weights("base_weights", *options.network.base_weights)
    _refuse_missing_weights("weights", options.embedding.weights)
    trackers = plan_trackers(options)
    samples = plan_samples(options.samples)
    resume = _state_to_resume(options)

    # torch loads from here on
    seed = _seed(options, resume)
    from library.optimizers.trial import refuse_useless
    from library.run import base_weights
    from library.run.rehearse import rehearse

    _check_weight_files(options.network)
    choice = _choose_optimizer(options, validates=_validates(options, datasets))
    rates = _rates(options)
    refuse_useless(choice, rates, precision=options.precision.of_weights)
    family = base_of(options, families=families)
    options = _with_defaults_of(family, options)
    base_weights.warn(options.network, family)
    word.learn(options, family)
    if samples is not None:
        samples = with_samplers_of(samples, family.process.samplers, given="sample_sampler" in options.given)
        told, flow = family.rendering.guidance is not None, family.process.prediction_type == "velocity"
        warn_of_idle_flags(samples.prompts, told=told, flow=flow)
    prepared, sets = (
        (slider.prepared_of(settings, datasets, options, family), ())
        if settings
        else _images(options, datasets, folders, seed=seed, multiple_of=family.size_divisor)
    )
    _refuse_large_images(family, prepared, sets, samples)
    word.check_captions(options, family, prepared)
    rehearsed = rehearse(family, options, arguments, resume=resume)
    if rehearsed.kernels:
        with log.errors_only():  # its warnings have been logged above
            refuse_useless(choice, rates, precision=options.precision.of_weights, kernels=rehearsed.kernels)
    started_at = time.time() if resume is None else resume.facts.started_at
    return Plan(
        options=options,
        datasets=datasets,
        prepared=prepared,
        sets=sets,
        family=family,
        choice=choice,
        network_arguments=arguments,
        seed=seed,
        parameters=rehearsed.parameters,
        trackers=trackers,
        samples=samples,
        started_at=started_at,
        session_id=int(started_at * 1000) % 2**32 if resume is None else resume.facts.session_id,
        resume=resume,
        settings=settings,
    )


def _with_defaults_of(family: ModelFamily, options: Options) -> Options:
    """The options with the family's own way of drawing timesteps, where the user chose none, and without text encoders
    where the family trains none. UserError for a run that would train nothing."""
    if not family.trains_text_encoders and not options.network.network_train_unet_only:
        if options.network.network_train_text_encoder_only:
            raise UserError(f"--network_train_text_encoder_only: the text encoder of {family.TITLE} is not trained")
        options = replace(options, network=replace(options.network, network_train_unet_only=True))
    if family.TIMESTEP_SAMPLING is None or options.given.keys() & {"timestep_sampling", "weighting_scheme"}:
        return options
    objective = replace(options.objective, timestep_sampling=family.TIMESTEP_SAMPLING)
    return replace(options, objective=objective)


def base_of(options: Options, *, families: tuple[str, ...] = ()) -> ModelFamily:
    """The family of the base model, opened but not loaded. `families`: as of `make_plan`."""
    return open_family(
        options.model.pretrained_model_name_or_path,
        vae=options.model.vae,
        only=families,
        options=vars(options.model) | vars(options.flow) | vars(options.objective),
        given=options.given,
    )


def _images(
    options: Options,
    datasets: tuple[DatasetSpec, ...],
    folders: Sequence[MeasuredFolder],
    *,
    seed: int,
    multiple_of: int,
) -> tuple[Prepared, tuple[MeasuredSet, ...]]:
    """The images to train and those to validate, and further sets to measure. If no images are held out, those to
    validate are the first folder of --validation_dir."""
    from library.data.prepare import prepare, some_trained

    wanted, skip = options.validation, options.data.skip_bad_images
    prepared = prepare(
        datasets,
        multiple_of=multiple_of,
        skip_bad_images=skip,
        seed=seed if wanted.validation_seed is None else wanted.validation_seed,
        measures=bool(folders) or wanted.validation_gap,
        validation_group=wanted.validation_group,
        fold=wanted.validation_fold,
    )
    sets = measured_sets(folders, prepared.contents, multiple_of=multiple_of, skip_bad_images=skip)
    if prepared.validation is None and sets and sets[0].use == "validation":
        prepared = replace(prepared, validation=sets.pop(0).prepared)
    if wanted.validation_gap:
        assert prepared.validation is not None, "check_validation has seen that"
        count = len(prepared.validation.samples)
        trained = some_trained(prepared, datasets, multiple_of=multiple_of, most=count)
        prepared = replace(prepared, trained=trained)
    return prepared, tuple(sets)


def _refuse_large_images(
    family: ModelFamily, prepared: Prepared, sets: Sequence[MeasuredSet], samples: SampleTimes | None
) -> None:
    """`UserError` for images or samples with a longer side than the model takes."""
    longest = family.longest_side
    if longest is None:
        return
    data = [prepared, prepared.validation, prepared.trained, *(one.prepared for one in sets)]
    sizes = {("an image's bucket", group.size) for one in data if one is not None for group in one.groups}
    sizes |= {("a sample", (item.width, item.height)) for item in (samples.prompts if samples else ())}
    for what, (width, height) in sorted(sizes):
        if max(width, height) > longest:
            raise UserError(
                f"{family.path} has places for {longest} pixels a side, and {what} has {width} × {height}: lower "
                "--resolution, --max_bucket_reso or the size in the prompt"
            )


def _state_to_resume(options: Options) -> State | None:
    """The state of --resume; None without that option."""
    if options.run.resume is None:
        return None
    output = options.output
    return find_state(options.run.resume, output_dir=Path(output.output_dir), output_name=output.output_name)


def _seed(options: Options, resume: State | None) -> int:
    """The user's seed, else that of the resumed run, else a random one that all processes share."""
    if options.training.seed is not None:
        return options.training.seed
    if resume is not None and resume.facts.seed is not None:
        return resume.facts.seed
    seed = together.agreed(random.SystemRandom().randrange(2**32), timeout=together.patience(options.run.ddp_timeout))
    logger.info("no --seed given: using %d; the same seed gives the same LoRA again", seed)
    return seed


def _choose_optimizer(options: Options, *, validates: bool) -> OptimizerChoice:
    """The optimizer and its arguments, checked against the options of rates and weight decay."""
    from library.optimizers import weight_decay_choice
    from library.optimizers.create import choose_optimizer

    choice = choose_optimizer(
        options.optimizer.optimizer_name,
        options.optimizer.optimizer_args,
        weight_decay=options.optimizer.weight_decay,
        custom_adamw=options.custom_adamw.given(),
    )
    if options.optimizer.lr_layer_decay is not None and (choice.finds_its_rate or choice.relative_step):
        raise UserError(f"--lr_layer_decay: {choice.name} finds its rate itself, one for all layers")
    weight_decay_choice.check_options(
        options.weight_decay,
        choice,
        clips_gradients=options.optimizer.max_grad_norm > 0,
        validates=validates,
    )
    return choice


def _check_metadata(output: OutputOptions) -> None:
    """Check the user's texts for the files' metadata; only safetensors files have any."""
    if output.save_model_as == "safetensors":
        texts = {name: text for name, text in vars(output).items() if name.startswith("metadata_")}
        check_user_metadata({**texts, "training_comment": output.training_comment})


def _warn_of_unused_rates(options: Options) -> None:
    network, optimizer = options.network, options.optimizer
    for option, rate, only in (
        ("text_encoder_lr", any(optimizer.text_encoder_lr or ()), "network_train_unet_only"),
        ("unet_lr", optimizer.unet_lr, "network_train_text_encoder_only"),
    ):
        if rate and getattr(network, only):
            logger.warning("--%s has no effect: with --%s that part is not trained", option, only)


def _rates(options: Options) -> dict[str, float]:
    """The rates of the trained parts, by name."""
    network, wanted = options.network, options.optimizer
    embedding = options.embedding
    own = wanted.learning_rate if embedding.embedding_lr is None else embedding.embedding_lr
    rates = {"embedding": own} if embedding.is_trained else {}
    if embedding.train_embedding_only:
        return rates
    if not network.network_train_text_encoder_only:
        rates["unet"] = wanted.learning_rate if wanted.unet_lr is None else wanted.unet_lr
    if not network.network_train_unet_only:
        of_text = wanted.text_encoder_lr or (wanted.learning_rate,)
        rates |= {f"text_encoder_{number}": rate for number, rate in enumerate(of_text, 1)}
    return rates


def _validates(options: Options, datasets: Sequence[DatasetSpec]) -> bool:
    """Whether some images are held out, or lie in a folder for validation."""
    return is_validated(datasets) or bool(options.validation.validation_dir)


def check_data_options(options: Options, datasets: tuple[DatasetSpec, ...]) -> None:
    """Check the data sets against the options about them, before any file is looked at."""
    check_masks(datasets, masked_loss=options.data.masked_loss)
    check_shares(datasets)
    check_validation(options.validation, validated=_validates(options, datasets))
    warn_of_idle_options(options)
    if options.data.cache_latents:
        refuse_latent_cache_of_changing_images(datasets, option=options.data.latent_cache_option)
    if options.data.cache_text_encoder_outputs:
        refuse_text_cache_of_changing_captions(datasets, option=options.data.text_cache_option)
    warn_of_captions_options(datasets)
    if options.data.skip_cache_check and not options.data.caches_to_disk:
        logger.warning("--skip_cache_check: has no effect: there is no cache on disk")


def _refuse_missing_weights(option: str, *files: str | None) -> None:
    for file in files:
        if file is not None and not os.path.isfile(file):
            raise UserError(f"--{option} {file}: no such file{nearest_path(Path(file))}")


def _check_weight_files(network: NetworkOptions) -> None:
    """Check the files of --network_weights and --base_weights by their headers."""
    from networks import merge

    kind = kinds.kind_of(network.network_module, network.network_args)
    trains = "" if kind is None else f"is trained by {network.network_module}"
    _check_weights("network_weights", network.network_weights, purpose=trains, allowed=kind and [kind, "norm"])
    _check_weights("base_weights", *network.base_weights, purpose=merge.PURPOSE)
    _warn_of_other_base(network)


def _check_weights(option: str, *given: str | None, purpose: str, allowed: Sequence[str] | None = None) -> None:
    """Check files by their headers, before the models are loaded. `purpose`, `allowed`: see `networks.files.check`."""
    from networks import files

    for file in given:
        try:
            if file is not None:
                files.check(file, purpose=purpose, allowed=allowed)
        except UserError as error:
            raise UserError(f"--{option} {error}") from None


def _warn_of_other_base(network: NetworkOptions) -> None:
    """Warn of LoRAs that were trained on top of others, unless --base_weights merges those here, too."""
    from networks import base_weights

    given: list[base_weights.BaseFile] | None = None
    for option, files in (("network_weights", (network.network_weights,)), ("base_weights", network.base_weights)):
        for file in files:
            if file is None or not (trained_on := base_weights.read(Path(file))):
                continue
            if given is None:
                given = base_weights.of_files(network.base_weights, network.base_weights_multiplier or ())
            if lacking := [item for item in trained_on if not any(item.is_same(own) for own in given)]:
                logger.warning(
                    "--%s %s: was trained on top of %s, which --base_weights does not merge here: its effect differs",
                    *(option, file, base_weights.in_words(lacking)),
                )


def _network_arguments(options: Options) -> dict[str, Any]:
    """--network_args as arguments of the network's settings, or of a foreign module's function."""
    network = options.network
    decays = options.optimizer.lr_layer_decay is not None
    if decays and (refusal := kinds.refuses(network.network_module, "lr_layer_decay")):
        raise UserError(refusal)
    arguments, unchecked = kinds.arguments(
        network.network_module, network.network_args, from_file=network.dim_from_weights
    )
    if unchecked:
        creator = kinds.creator(network.network_module, from_file=network.dim_from_weights)
        logger.warning("--network_args: %s takes any name, so these are not checked: %s", creator, ", ".join(unchecked))
    return arguments
