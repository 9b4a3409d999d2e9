"""Gathers the metadata of a run's files from its options, data and model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from library.config.options.objective import ObjectiveOptions
from library.data.captions import as_written
from library.data.dataset import TrainingData
from library.data.samples import Sample
from library.diffusion.process import Process
from library.optimizers.weight_decay_choice import DecayChoice
from library.record.dataset_metadata import DatasetFacts, SubsetFacts
from library.record.metadata import RunFacts, RunMetadata
from library.record.modelspec import ModelSpec, data_url
from library.record.protections import to_metadata
from library.record.saves import SavePlan
from library.run import slider
from library.run.about.protections import protections_of
from library.run.base_weights import are_apart
from library.run.plan import Plan
from networks import base_weights


def run_metadata(
    plan: Plan, saves: SavePlan, data: TrainingData, *, world_size: int, decay: DecayChoice | None
) -> RunMetadata:
    """The metadata of every file of this run, without the time, step and epoch of each."""
    options, family = plan.options, plan.family
    datasets = [] if plan.settings else list(_datasets(plan, data))
    per_device = max(spec.batch_size for spec in plan.datasets)
    return RunMetadata(
        facts=_run_facts(plan, saves, data, datasets),
        datasets=datasets,
        spec=_model_spec(plan),
        model=family.path,
        vae=family.vae_path,
        total_batch_size=per_device * world_size * options.training.gradient_accumulation_steps,
        from_dataset_config=options.data.dataset_config is not None or not datasets,
        network_args=None if options.embedding.train_embedding_only else plan.network_arguments,
        timestep_distribution=_timestep_distribution(options.objective),
        ours=_ours(plan, decay),
        no_metadata=options.output.no_metadata,
    )


def _ours(plan: Plan, decay: DecayChoice | None) -> dict[str, object]:
    """Settings that kohya has no keys for, and those of the model's family; written where they are used."""
    layer_decay, presets = plan.options.optimizer.lr_layer_decay, plan.options.guidance.preset
    ours: dict[str, object] = {"preset": ",".join(presets)} if presets else {}
    ours |= plan.family.settings
    if (network := plan.options.network).base_weights:
        files = base_weights.of_files(network.base_weights, network.base_weights_multiplier or ())
        key = base_weights.KEY_APART if are_apart(network, plan.family) else base_weights.KEY
        ours[key.removeprefix("ss_")] = base_weights.to_text(files)
    if (embedding := plan.options.embedding).is_trained:
        names = ("token_string", "init_word", "num_vectors_per_token", "embedding_lr")
        ours |= {name: getattr(embedding, name) for name in names}
    if layer_decay is not None:
        ours["lr_layer_decay"] = layer_decay
    if (average := plan.options.ema).ema_decay is not None:
        ours |= {"ema_decay": average.ema_decay, "ema_for": " ".join(average.purposes)}
    subsets = [subset for dataset in plan.datasets for subset in dataset.subsets]
    if any(subset.share is not None for subset in subsets):
        shares = {subset.source.name: subset.share for subset in subsets if subset.share is not None}
        ours["shares"] = json.dumps(shares)
    if (protections := protections_of(plan)) is not None:
        ours |= to_metadata(protections)
    ours |= slider.metadata(plan.settings, plan.options)
    return ours | ({} if decay is None else decay.metadata())


_OF_OBJECTIVE = (
    "min_snr_gamma",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "noise_offset",
    "noise_offset_random_strength",
    "adaptive_noise_scale",
    "multires_noise_iterations",
    "multires_noise_discount",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
)
"""Options of the objective that are facts of the same name."""


def _run_facts(plan: Plan, saves: SavePlan, data: TrainingData, datasets: list[DatasetFacts]) -> RunFacts:
    options, family, choice = plan.options, plan.family, plan.choice
    arguments = ",".join(f"{name}={value}" for name, value in choice.arguments.items())
    own_schedule = "adafactor" if choice.relative_step else "constant" if choice.schedule_free else ""
    alone = options.embedding.train_embedding_only
    text_rates = options.optimizer.text_encoder_lr and list(options.optimizer.text_encoder_lr)
    return RunFacts(
        session_id=plan.session_id,
        training_started_at=plan.started_at,
        output_name=options.output.output_name,
        learning_rate=options.optimizer.learning_rate,
        text_encoder_lr=text_rates[0] if text_rates and len(text_rates) == 1 else text_rates,
        unet_lr=options.optimizer.unet_lr,
        num_train_images=sum(facts.num_train_images for facts in datasets),
        num_reg_images=sum(facts.num_reg_images for facts in datasets),
        num_validation_images=0 if plan.prepared.validation is None else len(plan.prepared.validation.samples),
        validation_split=_of_validation(plan, "validation_split"),
        validation_seed=_of_validation(plan, "validation_seed"),
        max_validation_steps=options.validation.max_validation_steps,
        validate_every_n_steps=options.validation.validate_every_n_steps,
        validate_every_n_epochs=options.validation.validate_every_n_epochs,
        num_batches_per_epoch=data.batches_per_epoch,
        num_epochs=saves.epochs,
        gradient_checkpointing=options.precision.gradient_checkpointing,
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        max_train_steps=saves.total_steps,
        lr_warmup_steps=0 if own_schedule else options.schedule.lr_warmup_steps,
        lr_scheduler=own_schedule or options.schedule.lr_scheduler_type or options.schedule.lr_scheduler,
        network_module="networks.embeddings" if alone else options.network.network_module,
        network_dim=None if alone else options.network.network_dim,
        network_alpha=None if alone else options.network.network_alpha,
        network_dropout=options.network.network_dropout,
        mixed_precision=options.precision.mixed_precision,
        full_fp16=options.precision.full_fp16,
        fp8_base=options.precision.fp8_base or options.precision.base_format == "fp8",
        fp8_base_unet=options.precision.fp8_base_unet,
        v2=family.base_model_version.startswith("sd_v2"),
        base_model_version=family.base_model_version,
        clip_skip=family.clip_skip,
        max_token_length=options.model.max_token_length,
        cache_latents=options.data.cache_latents,
        seed=plan.seed,
        training_comment=options.output.training_comment,
        optimizer=choice.path + (f"({arguments})" if arguments else ""),
        max_grad_norm=options.optimizer.max_grad_norm,
        caption_dropout_rate=_option_of_all(plan, "caption_dropout_rate"),
        caption_dropout_every_n_epochs=_option_of_all(plan, "caption_dropout_every_n_epochs"),
        caption_tag_dropout_rate=_option_of_all(plan, "caption_tag_dropout_rate"),
        prior_loss_weight=options.data.prior_loss_weight,
        scale_weight_norms=options.network.scale_weight_norms,
        face_crop_aug_range=options.data.face_crop_aug_range,
        resize_interpolation=options.data.resize_interpolation,
        **{name: getattr(options.objective, name) for name in _OF_OBJECTIVE},
        debiased_estimation=options.objective.debiased_estimation_loss,
        # of the process, not the option: a base model's own noise schedule can have it, too
        zero_terminal_snr=_ends_in_noise(family.process),
    )


def _ends_in_noise(process: Process) -> bool:
    """Whether the last step is pure noise."""
    last = process.at(torch.tensor([process.steps - 1]))
    return not process.signal_to_noise(last).item()


def _timestep_distribution(options: ObjectiveOptions) -> dict[str, object] | None:
    """The keys of kohya's scripts for SD3 and FLUX, where the timesteps are not drawn uniformly."""
    if options.density == "uniform" and options.training_shift == 1:
        return None
    names = ("timestep_sampling", "sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")
    return {name: getattr(options, name) for name in (*names, "training_shift")}


def _timestep_range(options: ObjectiveOptions) -> tuple[int, int] | None:
    """The range as kohya writes it: only if it was limited."""
    low, high = options.min_timestep, options.max_timestep
    return None if low is None and high is None else (low or 0, 1000 if high is None else high)


def _option_of_all(plan: Plan, name: str) -> Any:
    """The value that all subsets have for this option; if they differ, the option's own value, as in kohya's files."""
    return _shared(plan, name, getattr(plan.options.data, name))


def _of_validation(plan: Plan, name: str) -> Any:
    """The same for an option of validation; regularisation images have no part in it."""
    return _shared(plan, name, getattr(plan.options.validation, name))


def _shared(plan: Plan, name: str, otherwise: Any) -> Any:
    values = {getattr(subset, name) for dataset in plan.datasets for subset in dataset.subsets}
    return values.pop() if len(values) == 1 else otherwise


def _datasets(plan: Plan, data: TrainingData) -> Iterator[DatasetFacts]:
    for number, spec in enumerate(plan.datasets):
        groups = [group for group in data.groups if group.dataset == number]
        members = [(data.samples[i], draws, data.placements[i]) for g in groups for i, draws in g.members]
        errors = [
            abs(sample.size[0] / sample.size[1] - placement.bucket[0] / placement.bucket[1])
            for sample, _, placement in members
        ]
        yield DatasetFacts(
            batch_size=spec.batch_size,
            num_train_images=round(sum(draws for sample, draws, _ in members if not sample.subset.is_reg)),
            num_reg_images=round(sum(draws for sample, draws, _ in members if sample.subset.is_reg)),
            resolution=spec.resolution,
            enable_bucket=spec.enable_bucket,
            min_bucket_reso=spec.min_bucket_reso,
            max_bucket_reso=spec.max_bucket_reso,
            bucket_no_upscale=spec.bucket_no_upscale,
            subsets=_subsets([sample for sample, _, _ in members]),
            buckets=[(group.size, group.draws) for group in groups],
            mean_img_ar_error=sum(errors) / len(errors) if errors else 0.0,
            skip_image_resolution=spec.skip_image_resolution,
            resize_interpolation=_of_all({subset.resize_interpolation for subset in spec.subsets}),
        )


def _of_all(values: set[str | None]) -> str | None:
    """The value that all subsets of a data set share, else None."""
    return next(iter(values)) if len(values) == 1 else None


def _subsets(samples: list[Sample]) -> list[SubsetFacts]:
    """The facts about each folder that the samples of a data set come from."""
    by_origin: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        by_origin.setdefault((sample.subset.origin, str(sample.subset.source)), []).append(sample)
    return [
        SubsetFacts(
            image_dir=own[0].subset.image_dir,
            metadata_file=own[0].subset.metadata_file,
            img_count=len(own),
            num_repeats=own[0].subset.num_repeats,
            captions=[text for sample in own for text in as_written(sample.caption, sample.subset)],
            caption_separator=own[0].subset.caption_separator,
            is_reg=own[0].subset.is_reg,
            class_tokens=own[0].subset.class_tokens,
            color_aug=own[0].subset.color_aug,
            flip_aug=own[0].subset.flip_aug,
            random_crop=own[0].subset.random_crop,
            resize_interpolation=own[0].subset.resize_interpolation,
            shuffle_caption=own[0].subset.shuffle_caption,
            keep_tokens=own[0].subset.keep_tokens,
            keep_tokens_separator=own[0].subset.keep_tokens_separator,
            secondary_separator=own[0].subset.secondary_separator,
            enable_wildcard=own[0].subset.enable_wildcard,
            caption_prefix=own[0].subset.caption_prefix,
            caption_suffix=own[0].subset.caption_suffix,
        )
        for own in by_origin.values()
    ]


def _model_spec(plan: Plan) -> ModelSpec:
    output, family = plan.options.output, plan.family
    return ModelSpec(
        architecture=family.architecture,
        title=output.metadata_title or output.output_name or "last",
        resolution=plan.datasets[0].resolution,
        prediction_type=family.process.prediction_type,
        implementation=family.implementation,
        author=output.metadata_author,
        description=output.metadata_description,
        license=output.metadata_license,
        tags=output.metadata_tags,
        usage_hint=output.metadata_usage_hint,
        thumbnail=output.metadata_thumbnail and data_url(output.metadata_thumbnail),
        merged_from=output.metadata_merged_from,
        trigger_phrase=output.metadata_trigger_phrase or plan.options.embedding.token_string,
        preprocessor=output.metadata_preprocessor,
        is_negative_embedding=output.metadata_is_negative_embedding,
        timestep_range=_timestep_range(plan.options.objective),
        encoder_layer=family.clip_skip,
        is_embedding=plan.options.embedding.train_embedding_only,
    )
