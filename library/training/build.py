"""From options to a run: the only file that knows every part."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.config import registry, source
from library.config.options import Options
from library.data.dataset import TrainingData
from library.errors import UserError
from library.losses import LOSSES, WEIGHTINGS
from library.models.family import ModelFamily
from library.optimizers.create import OptimizerChoice, ParameterGroups, create_optimizer
from library.optimizers.schedules import create_schedule, warmup_steps
from library.training import loop, save, state
from library.training.facts import run_metadata
from library.training.metadata import belongs_to
from library.training.plan import Plan
from library.training.step import Objective
from networks.protocol import check_max_norm, load_weights, optimizer_groups, step_hook

logger = logging.getLogger(__name__)

WriteState = Callable[[Path, int], None]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Built:
    """A run ready to start, and what the reports about it need."""

    run: loop.Run
    plan: Plan
    saves: save.SavePlan
    groups: ParameterGroups  # with the rates as given, which a schedule changes in the optimizer's own
    warmup: int


def build(plan: Plan) -> Built:
    """Load, encode, wrap: everything before the first step. The memory of each part goes back once it has served."""
    options = plan.options
    choice = plan.choice
    accelerator = _accelerator(options)
    saves = _save_plan(plan, accelerator)
    now = _state_facts(plan, saves, per_step=accelerator.num_processes * options.training.gradient_accumulation_steps)
    if plan.resume is not None:
        steady = options.optimizer.lr_scheduler in ("constant", "constant_with_warmup")
        state.refuse_other_run(
            plan.resume, now=now, curve_depends_on_length=not steady, anyway=options.run.resume_anyway
        )
    warmup = warmup_steps(options.optimizer.lr_warmup_steps, saves.total_steps)
    data = TrainingData(plan.prepared, seed=plan.seed, prior_loss_weight=options.data.prior_loss_weight)

    _load_and_encode(plan.family, data, options, accelerator, cache=not options.run.dry_run)
    network = _network(plan, accelerator)
    groups = optimizer_groups(
        network,
        text_encoder_lr=options.optimizer.text_encoder_lr,
        unet_lr=options.optimizer.unet_lr,
        default_lr=options.optimizer.learning_rate,
    )
    optimizer = create_optimizer(
        choice, [dict(group) for group in groups], learning_rate=options.optimizer.learning_rate
    )
    if options.precision.full_fp16:
        _refuse_vanishing_eps(choice, optimizer)
    schedule = _schedule(options, choice, optimizer, total_steps=saves.total_steps, warmup=warmup)
    run = loop.Run(
        accelerator=accelerator,
        family=plan.family,
        network=network,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=accelerator.prepare_optimizer(optimizer),
        schedule=schedule,
        data=data,
        objective=_objective(options, plan.family),
        loader=data.loader(
            workers=options.data.max_data_loader_n_workers,
            world_size=accelerator.num_processes,
            persistent=options.data.persistent_data_loader_workers,
        ),
        seed=plan.seed,
        total_steps=saves.total_steps,
        accumulation=options.training.gradient_accumulation_steps,
        train_text=_trains_text(options),
        max_grad_norm=options.optimizer.max_grad_norm,
        scale_weight_norms=options.network.scale_weight_norms,
        schedule_free=choice.schedule_free,
        on_step=step_hook(network),
        save=_nothing,
        save_now=_nothing,
    )
    if plan.resume is not None:
        state.load(plan.resume, run)
    if accelerator.is_main_process and not options.run.dry_run:
        metadata = run_metadata(plan, saves, data, world_size=accelerator.num_processes)
        precision = options.output.save_precision
        write_state = partial(_write_state, run, now)
        run.save = partial(_save_due, saves, network, precision, metadata, write_state)
        run.save_now = partial(_save_now, saves, network, precision, metadata, write_state)
    return Built(run, plan, saves, groups, warmup)


def _accelerator(options: Options) -> Accelerator:
    logging_dir = options.logging.logging_dir
    if logging_dir is not None:
        stamp = time.strftime("%Y%m%d%H%M%S")
        logging_dir = str(Path(logging_dir) / f"{options.logging.log_prefix or ''}{stamp}")
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision.mixed_precision,
            log_with="tensorboard" if logging_dir else None,
            project_dir=logging_dir,
        )
    except ValueError as error:  # fp16 on a CPU, bf16 on a device without it
        raise UserError(f"--mixed_precision {options.precision.mixed_precision}: {error}") from error
    if logging_dir is not None and not options.run.dry_run:
        accelerator.init_trackers(options.logging.log_tracker_name or "network_train")
    return accelerator


def _save_plan(plan: Plan, accelerator: Accelerator) -> save.SavePlan:
    """How long the run is and which files it writes; checked against what lies there already."""
    options, output = plan.options, plan.options.output
    per_step = accelerator.num_processes * options.training.gradient_accumulation_steps
    steps_per_epoch = math.ceil(plan.prepared.batches_per_epoch / per_step)
    total_steps = options.training.max_train_steps
    if options.training.max_train_epochs is not None:
        total_steps = options.training.max_train_epochs * steps_per_epoch
    every_n_epochs = output.save_every_n_epochs
    if output.save_n_epoch_ratio:
        every_n_epochs = save.epochs_from_ratio(math.ceil(total_steps / steps_per_epoch), output.save_n_epoch_ratio)
    saves = save.SavePlan(
        folder=Path(output.output_dir),
        name=output.output_name,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        every_n_steps=output.save_every_n_steps,
        every_n_epochs=every_n_epochs,
        last_n_steps=output.save_last_n_steps,
        last_n_epochs=output.save_last_n_epochs,
        states=output.save_state,
        state_at_end=output.save_state_on_train_end,
        last_n_steps_state=output.save_last_n_steps_state,
        last_n_epochs_state=output.save_last_n_epochs_state,
    )
    if accelerator.is_main_process and not options.run.dry_run:
        _check_free(plan, saves)
        save.prepare_folder(saves.folder)
    accelerator.wait_for_everyone()
    return saves


def _check_free(plan: Plan, saves: save.SavePlan) -> None:
    """Nothing is replaced without --overwrite but, when a run is resumed, its own files."""
    resume = plan.resume
    files = saves.planned_files(after_step=resume.facts.step if resume else 0)
    drawn = list(pictures(plan.options, saves).values())
    if resume is not None:
        files = [file for file in files if not belongs_to(file, session_id=plan.session_id)]
        drawn = drawn if saves.last_file in files else []  # the pictures of a file are its run's
    save.check_free([*files, *drawn], overwrite=plan.options.output.overwrite)


def pictures(options: Options, saves: save.SavePlan) -> dict[str, Path]:
    """The pictures that the run draws at its end, beside its last file: "loss" and "compare"."""
    wanted = {"loss": options.output.loss_plot, "compare": bool(options.output.compare_prompts)}
    stem = saves.last_file.stem
    return {kind: saves.last_file.with_name(f"{stem}-{kind}.png") for kind, asked in wanted.items() if asked}


def vae_dtype(options: Options) -> torch.dtype:
    """What the VAE computes in."""
    return torch.float32 if options.model.no_half_vae else DTYPES[options.precision.mixed_precision]


def _load_and_encode(
    family: ModelFamily, data: TrainingData, options: Options, accelerator: Accelerator, *, cache: bool
) -> None:
    """VAE, text encoders, UNet, one after the other, so that no more lies in memory than is needed at the time.

    Without `cache` nothing is encoded, and everything stays loaded: a dry run looks at all parts.
    """
    device, dtype = accelerator.device, DTYPES[options.precision.mixed_precision]
    family.load_vae(vae_dtype(options), device)
    if cache and options.data.cache_latents:
        data.cache_latents(family.encode_images, batch_size=options.data.vae_batch_size)
        family.release_vae()
        _give_back(device)

    family.load_text_encoders(dtype, device)
    if cache and options.data.cache_text_encoder_outputs:
        batch_size = options.data.text_encoder_batch_size or options.data.train_batch_size
        data.cache_captions(family.encode_prompts, batch_size=batch_size)
        family.release_text_encoders()
        _give_back(device)

    family.load_unet(dtype, device)
    # Checkpointing is active in training mode only; nothing else in the UNet differs between the modes.
    assert family.unet is not None
    family.unet.train()
    if options.precision.gradient_checkpointing:
        family.unet.enable_gradient_checkpointing()
        if _trains_text(options):
            for encoder in family.text_encoders:
                encoder.activation_checkpointing_enable()
                encoder.train()


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _trains_text(options: Options) -> bool:
    return not options.network.network_train_unet_only


def _network(plan: Plan, accelerator: Accelerator) -> Any:
    """The adapter network, on the model, in its precision, with its starting weights."""
    options, family = plan.options, plan.family
    wanted = options.network
    module = importlib.import_module(wanted.network_module)
    creator = getattr(module, plan.network_creator)
    ours = {"targets": family.adapter_targets(), "seed": plan.seed}
    arguments = plan.network_arguments | {
        name: value for name, value in ours.items() if name in inspect.signature(creator).parameters
    }
    text_encoders = family.third_party_text_encoders()
    with _refusals(wanted.network_module):
        if wanted.dim_from_weights:
            network, _ = creator(1.0, wanted.network_weights, family.vae, text_encoders, family.unet, **arguments)
        else:
            network = creator(
                1.0,
                wanted.network_dim,
                wanted.network_alpha,
                family.vae,
                text_encoders,
                family.unet,
                neuron_dropout=wanted.network_dropout,
                **arguments,
            )
    if wanted.scale_weight_norms:
        check_max_norm(network)
    trains_unet = not wanted.network_train_text_encoder_only
    network.apply_to(text_encoders, family.unet, _trains_text(options), trains_unet)
    if wanted.network_weights is not None:
        load_weights(network, wanted.network_weights)
    if options.precision.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    full = options.precision.full_fp16 or options.precision.full_bf16
    network.to(accelerator.device, DTYPES[options.precision.mixed_precision] if full else torch.float32)
    network.prepare_grad_etc(text_encoders, family.unet)
    return network


@contextmanager
def _refusals(module: str) -> Iterator[None]:
    """Third-party modules refuse settings in many ways, and know no UserError."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if source.is_ours(module):
            raise
        hint = ""
        if "duplicated lora name" in str(error):
            hint = ". In LyCORIS 4.1 the default preset names some layers twice: --network_args preset=attn-mlp"
        raise UserError(f"--network_module {module} refuses these settings: {error!r}{hint}") from error


def _refuse_vanishing_eps(choice: OptimizerChoice, optimizer: torch.optim.Optimizer) -> None:
    """torch's own optimizers compute in the parameters' type, where an eps of 1e-8 is 0: 0 / 0 at the first step."""
    eps = optimizer.defaults.get("eps")
    if choice.path.startswith("torch.optim.") and eps and torch.tensor(eps, dtype=torch.float16) == 0:
        raise UserError(
            f"--full_fp16 with {choice.name}: its eps of {eps:g} is 0 in fp16, and the weights become NaN. Give "
            "--optimizer_args eps=1e-4, an 8-bit optimizer (they compute in fp32), or --full_bf16 instead."
        )


def _schedule(
    options: Options, choice: OptimizerChoice, optimizer: torch.optim.Optimizer, *, total_steps: int, warmup: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    wanted = options.optimizer
    if choice.schedule_free or choice.relative_step:
        if wanted.lr_scheduler != "constant" or warmup:
            reason = "needs no schedule" if choice.schedule_free else "makes its own schedule (relative_step)"
            logger.warning("%s %s: --lr_scheduler and --lr_warmup_steps have no effect.", choice.name, reason)
        return None
    return create_schedule(
        wanted.lr_scheduler,
        optimizer,
        total_steps=total_steps,
        warmup=warmup,
        num_cycles=wanted.lr_scheduler_num_cycles,
        power=wanted.lr_scheduler_power,
    )


def _objective(options: Options, family: ModelFamily) -> Objective:
    weighting: Callable[[torch.Tensor], torch.Tensor] | None = None
    if options.training.min_snr_gamma:
        weighting = partial(
            registry.load(WEIGHTINGS, "min_snr", where="--min_snr_gamma"),
            gamma=options.training.min_snr_gamma,
            prediction_type=family.prediction_type,
        )
    return Objective(
        prediction_type=family.prediction_type,
        alphas_cumprod=family.alphas_cumprod,
        loss=registry.load(LOSSES, options.training.loss_type, where="--loss_type"),
        weighting=weighting,
    )


def _nothing(step: int) -> None:
    """What processes other than the first save."""


def _state_facts(plan: Plan, saves: save.SavePlan, *, per_step: int) -> state.Facts:
    return state.Facts(
        format=state.FORMAT,
        step=0,
        total_steps=saves.total_steps,
        seed=plan.seed,
        session_id=plan.session_id,
        started_at=plan.started_at,
        batches_per_step=per_step,
        configuration=state.configuration(plan.options),
        data=state.data_hash(plan.datasets, plan.prepared),
    )


def _write_state(run: loop.Run, facts: state.Facts, folder: Path, step: int) -> None:
    state.write(folder, run, facts, step)


def _save_due(
    saves: save.SavePlan, network: Any, precision: str | None, metadata: Any, write_state: WriteState, step: int
) -> None:
    """Write what is due after `step` steps, then remove what retention no longer keeps."""
    for due in saves.due(step):
        save.save_network(network, due.path, precision=precision, metadata=metadata.at(steps=step, epoch=due.epoch))
        if due.state is not None:
            write_state(due.state, step)
        if due.remove is not None:
            save.remove_old(due.remove)
        if due.remove_state is not None:
            state.remove(due.remove_state)


def _save_now(
    saves: save.SavePlan, network: Any, precision: str | None, metadata: Any, write_state: WriteState, step: int
) -> None:
    """Write the network and the state as they are after `step` steps, for a run that ends early."""
    path = saves.step_file(step)
    epoch = (step - 1) // saves.steps_per_epoch
    save.save_network(network, path, precision=precision, metadata=metadata.at(steps=step, epoch=epoch))
    write_state(save.state_folder(path), step)
