"""From options to a run: the only file that knows every part."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from library import gpu
from library.config.options import Options
from library.data.dataset import TrainingData
from library.errors import CommonError, UserError
from library.losses.preservation import Preservation
from library.optimizers import weight_decay_choice
from library.optimizers.create import ParameterGroups, create_optimizer
from library.optimizers.schedules import ScheduleChoice, create_schedule
from library.optimizers.weight_decay_choice import DecayChoice
from library.parallel import shard, together, zero
from library.record import metrics, trackers
from library.record import saves as save
from library.record.metadata import belongs_to
from library.run import curves, disk
from library.run.encode import load_and_encode, trains_text, vae_dtype
from library.run.facts import run_metadata
from library.run.network import make_network, parameter_groups
from library.run.objective import make_objective
from library.run.plan import Plan
from library.sampling import render as sample
from library.training import loop, state
from library.training.hooks import validation
from library.training.hooks.ema import Ema
from library.training.hooks.guard import Guard
from library.training.hooks.saver import Saver
from library.training.meter import Meter
from networks.merge import BaseWeights
from networks.network import TrainableNetwork

logger = logging.getLogger(__name__)


@dataclass
class Built:
    """A run ready to start, and what the reports about it need."""

    run: loop.Run
    plan: Plan
    saves: save.SavePlan
    groups: ParameterGroups  # with the rates that a schedule changes in the optimizer's own; None: it makes them itself
    schedule: ScheduleChoice | None  # None: the optimizer's own, or none
    decay: DecayChoice | None  # of the weight decay; None: it stays as it is
    base_weights: BaseWeights
    prompts: sample.EncodedPrompts
    samples: Callable[[int], None]  # draw what is due after so many steps


@dataclass(frozen=True)
class Course:
    """What is settled before any weights are loaded: how long the run is, and what it writes after which steps."""

    plan: Plan  # its choice of the optimizer with the numbers that follow from the length
    accelerator: Accelerator
    saves: save.SavePlan
    facts: state.Facts
    schedule: ScheduleChoice | None
    decay: DecayChoice | None
    changed: frozenset[str]  # since the state that the run goes on from, as of `state.refuse_other_run`


def build(plan: Plan) -> Built:
    """Load, encode, wrap: everything before the first step. The memory of each part goes back once it has served."""
    objective = make_objective(plan.options.objective, plan.family)
    course = _course(plan)
    plan, options, accelerator, saves = course.plan, plan.options, course.accelerator, course.saves
    data = TrainingData(
        plan.prepared,
        seed=plan.seed,
        prior_loss_weight=options.data.prior_loss_weight,
        batches_per_step=course.facts.batches_per_step,
        total_steps=saves.total_steps,
    )

    base_weights = BaseWeights(options.network.base_weights, options.network.base_weights_multiplier or ())
    prompts = sample.EncodedPrompts(plan.family, _drawn_prompts(plan))
    held_out = validation.data_of(plan)
    load_and_encode(
        plan.family,
        data,
        options,
        accelerator,
        base_weights,
        prompts,
        validation=held_out,
        cache=not options.run.dry_run,
    )
    network = make_network(plan, accelerator)
    shares = shard.is_asked_for() and not options.run.dry_run and shard.shard(plan.family, accelerator)
    if any(subset.diff_output_preservation for dataset in plan.datasets for subset in dataset.subsets):
        if refusal := network.refuses("off"):  # now, and not in the first step
            raise UserError(refusal)
        objective = replace(objective, more=(Preservation(plan.family.predict, network.off),))
    groups, optimizer = _optimizer(plan, network)
    # before accelerate wraps the optimizer: it would put back a step() that the schedule does not know
    lr_schedule = None if course.schedule is None else create_schedule(course.schedule, optimizer)
    run = loop.Run(
        accelerator=accelerator,
        family=plan.family,
        network=network,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=accelerator.prepare_optimizer(optimizer),
        schedule=lr_schedule,
        data=data,
        objective=objective,
        loader=data.loader(
            workers=options.data.max_data_loader_n_workers,
            world_size=accelerator.num_processes,
            persistent=options.data.persistent_data_loader_workers,
            pin=accelerator.device.type == "cuda",
        ),
        seed=plan.seed,
        total_steps=saves.total_steps,
        accumulation=options.training.gradient_accumulation_steps,
        train_text=trains_text(options),
        max_grad_norm=options.optimizer.max_grad_norm,
        scale_weight_norms=options.network.scale_weight_norms,
        observe=weight_decay_choice.attach(course.decay, optimizer),
        save=_nothing,
        save_now=_nothing,
        guard=Guard(
            action=options.divergence.on_divergence,
            limit=options.divergence.divergence_limit,
            keeps_after=lambda step: bool(saves.due(step)),
        ),
    )
    _equip(run, course, groups, optimizer, held_out, shares=shares)
    samples = _write_as_planned(run, course, prompts)
    return Built(run, plan, saves, groups, course.schedule, course.decay, base_weights, prompts, samples)


def _course(plan: Plan) -> Course:
    """Raises UserError for whatever does not go together, or is in the way."""
    options = plan.options
    shard.refuse_what_cannot_be(options)
    if zero.is_asked_for():
        zero.refuse_what_cannot_be(options, plan.choice, plan.network_arguments)
    accelerator = _accelerator(plan)
    _refuse_idle_processes(accelerator.num_processes, plan.prepared.batches_per_epoch)
    per_step = accelerator.num_processes * options.training.gradient_accumulation_steps
    saves = _save_plan(plan, accelerator, batches_per_step=per_step)
    now = state.facts_of(plan, total_steps=saves.total_steps, batches_per_step=per_step)
    together.refuse_different(accelerator, now)
    decay = weight_decay_choice.resolve(
        options.weight_decay, plan.choice, total_steps=saves.total_steps, images=plan.prepared.train_images
    )
    given, choice = plan.choice, weight_decay_choice.apply(decay, options.weight_decay, plan.choice)
    plan = replace(plan, choice=choice)  # with the numbers of this run
    schedule = curves.schedule_of(options, choice, total_steps=saves.total_steps)
    if choice.averages and options.ema.ema_decay is not None:
        raise UserError(f"--ema_decay: {choice.name} averages the weights by itself: leave one of the two out")
    if choice.relative_step and options.divergence.on_divergence == "rollback":
        raise UserError(
            f"--on_divergence rollback: it halves the rates, and {choice.name} with relative_step makes its own: give "
            "--optimizer_args relative_step=False, or --on_divergence skip"
        )
    changed: frozenset[str] = frozenset()
    if plan.resume is not None:
        changed = state.refuse_other_run(
            plan.resume,
            now=now,
            of_length=curves.of_length(plan, schedule, decay, given=given),
            anyway=options.run.resume_anyway,
        )
    return Course(plan, accelerator, saves, now, schedule, decay, changed)


def _optimizer(plan: Plan, network: TrainableNetwork) -> tuple[ParameterGroups, torch.optim.Optimizer]:
    """The network's parameters in groups, each with its rate, and the optimizer of them."""
    options, choice = plan.options, plan.choice
    groups = parameter_groups(network, options)
    optimizer = create_optimizer(
        choice, [dict(group) for group in groups], learning_rate=max(group["lr"] for group in groups)
    )
    groups = [{**group, "lr": own["lr"]} for group, own in zip(groups, optimizer.param_groups, strict=True)]
    return groups, optimizer


def _equip(
    run: loop.Run,
    course: Course,
    groups: ParameterGroups,
    optimizer: torch.optim.Optimizer,
    held_out: TrainingData | None,
    *,
    shares: bool,
) -> None:
    """Give the run what not every run has, then put it where its state was. `shares`: the denoiser is shared out."""
    plan, options, accelerator, saves = course.plan, course.plan.options, course.accelerator, course.saves
    if zero.is_asked_for() and not options.run.dry_run:
        run.zero = zero.share_out(
            run.network, optimizer, accelerator, accumulation=run.accumulation, max_grad_norm=run.max_grad_norm
        )
        run.optimizer = run.zero or run.optimizer
    if shares or run.zero is not None:
        run.spare = next(run.data.batches([run.data.plan(0)[accelerator.process_index]], epoch=0, loader=run.loader))
    if options.ema.ema_decay is not None:
        run.ema = Ema(run.parameters, decay=options.ema.ema_decay, purposes=options.ema.purposes)
    if options.monitoring.monitoring:
        by_name = {group["name"]: group["params"] for group in groups}
        run.meter = Meter(by_name, run.network, accelerator, process=run.objective.process)
    if held_out is not None:
        validation.attach(run, held_out, options, steps_per_epoch=saves.steps_per_epoch)
    if plan.resume is not None:
        state.load(plan.resume, run, changed=course.changed)


def _write_as_planned(run: loop.Run, course: Course, prompts: sample.EncodedPrompts) -> Callable[[int], None]:
    """Have the run write its files, states and samples. Returns what draws the samples after so many steps."""
    plan, options, accelerator, saves = course.plan, course.plan.options, course.accelerator, course.saves
    samples: Callable[[int], None] = _nothing
    if accelerator.is_main_process and options.trains:
        disk.refuse_full_disk(
            saves,
            after_step=run.done,
            of_file=disk.file_bytes(run.network.tensors(), options.output.save_precision),
            # at least: the optimizer's part is not known before a step
            of_state=disk.file_bytes(run.network.state_dict(), None),
        )
        samples = _sampling(plan, saves, accelerator, run.network, prompts) or samples
        saver = Saver(
            saves=saves,
            run=run,
            facts=course.facts,
            precision=options.output.save_precision,
            metadata=run_metadata(plan, saves, run.data, world_size=accelerator.num_processes, decay=course.decay),
            samples=samples,
        )
        run.save, run.save_now, run.save_best, run.save_last = saver.due, saver.now, saver.best, saver.last
        if plan.resume is not None:
            validation.go_on_with_best(run, saves.best_file)
    if run.zero is not None:
        zero.gather_before_saving(run, run.zero, saves)
    return samples


def _accelerator(plan: Plan) -> Accelerator:
    options = plan.options
    try:
        with shard.without_accelerates_own():
            accelerator = Accelerator(
                mixed_precision=options.precision.mixed_precision,
                # else a number in the environment would divide the losses, which this program does itself
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                log_with=list(plan.trackers.names) or None,
                project_dir=plan.trackers.folder,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=together.patience(options.run.ddp_timeout))],
            )
    except ValueError as error:  # fp16 on a CPU, bf16 on a device without it
        raise UserError(f"--mixed_precision {options.precision.mixed_precision}: {error}") from error
    if options.precision.holds_unet_in_float8 and accelerator.device.type == "mps":
        raise UserError(f"--{options.precision.float8_option}: Apple's GPUs have no floats of 8 bits; leave it out")
    if options.precision.full_fp16 and accelerator.scaler is not None:
        gpu.unscale_fp16(accelerator.scaler)
    if accelerator.device.type == "cuda":
        gpu.settle(deterministic=options.precision.deterministic, allow_tf32=options.precision.allow_tf32)
    else:
        for name in ("deterministic", "allow_tf32"):
            if name in options.given:
                logger.warning("%s: has no effect on %s", options.given[name], accelerator.device)
    if options.trains:
        trackers.start(accelerator, plan.trackers, options)
    return accelerator


def _refuse_idle_processes(processes: int, batches: int) -> None:
    if batches < processes:
        raise CommonError(
            f"{processes} processes, and an epoch has only {batches} batches: some would never get one. Start fewer, "
            "lower --train_batch_size, or give more images or repeats"
        )


def _save_plan(plan: Plan, accelerator: Accelerator, *, batches_per_step: int) -> save.SavePlan:
    """How long the run is and which files it writes; checked against what lies there already."""
    options, output = plan.options, plan.options.output
    steps_per_epoch = math.ceil(plan.prepared.batches_per_epoch / batches_per_step)
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
        ending=output.save_model_as,
        best=plan.prepared.validation is not None,
    )
    if accelerator.is_main_process and options.trains:
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
    save.check_free([*files, *drawn, *metrics.new_files(plan, saves)], overwrite=plan.options.output.overwrite)


def pictures(options: Options, saves: save.SavePlan) -> dict[str, Path]:
    """The pictures that the run draws at its end, beside its last file: "loss" and "compare"."""
    wanted = {"loss": options.output.loss_plot, "compare": bool(options.output.compare_prompts)}
    stem = saves.last_file.stem
    return {kind: saves.last_file.with_name(f"{stem}-{kind}.png") for kind, asked in wanted.items() if asked}


def _drawn_prompts(plan: Plan) -> list[str]:
    """Every text that samples and pictures will need, negative ones as well."""
    samples = plan.samples.prompts if plan.samples is not None else ()
    texts = [text for item in samples for text in (item.prompt, item.negative_prompt)]
    compared = plan.options.output.compare_prompts
    return [*texts, *compared, *([""] if compared else [])]


def _sampling(
    plan: Plan,
    saves: save.SavePlan,
    accelerator: Accelerator,
    network: TrainableNetwork,
    prompts: sample.EncodedPrompts,
) -> sample.Sampling | None:
    """What draws samples during training, if any are to be drawn."""
    if plan.samples is None:
        return None
    for item in plan.samples.prompts:
        sample.check_sampler(item.sample_sampler or plan.samples.sampler)
    return sample.Sampling(
        times=plan.samples,
        family=plan.family,
        network=network,
        encode=prompts,
        vae_dtype=vae_dtype(plan.family, plan.options),
        autocast=accelerator.autocast,
        device=accelerator.device,
        show=partial(trackers.log_image, accelerator),
        folder=saves.folder / "sample",
        name=saves.name,
        seed=plan.seed,
        since=plan.started_at,
        steps_per_epoch=saves.steps_per_epoch,
    )


def _nothing(step: int) -> None:
    """What processes other than the first save."""
