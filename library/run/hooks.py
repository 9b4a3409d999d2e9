"""The hooks of a run, from its options, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch.optim.lr_scheduler import LRScheduler

from library.config.options import Options
from library.data.dataset import TrainingData
from library.diffusion.process import BINS, middles
from library.losses.distillation import Distillation
from library.parallel import zero
from library.record import trackers
from library.record.run_file import RunFile
from library.record.validation_history import History
from library.run import slider
from library.run.about.facts import run_metadata
from library.run.curves import Curves
from library.run.encode import vae_dtype
from library.run.measured import Use
from library.run.plan import Plan
from library.run.start import pictures
from library.sampling import render
from library.sampling.prompts import SampleTimes
from library.training.hook import Hook
from library.training.hooks.base_weights import OffInPictures
from library.training.hooks.ema import Ema
from library.training.hooks.ewc import Consolidation
from library.training.hooks.forgetting import ForgettingMeter
from library.training.hooks.guard import Guard
from library.training.hooks.lr_schedule import LrSchedule
from library.training.hooks.max_norm import MaxNorm
from library.training.hooks.monitor import Monitor
from library.training.hooks.multiplier import Multiplier
from library.training.hooks.pictures import Pictures
from library.training.hooks.progress import Progress
from library.training.hooks.sampler import Sampler
from library.training.hooks.saver import Saver
from library.training.hooks.spill import Spill
from library.training.hooks.validation import Times, Validator
from library.training.hooks.validation_sets import ValidationSets
from library.training.hooks.weight_decay import Observe, WeightDecay
from library.training.meter import Meter
from library.training.run import Run
from library.training.state import Facts
from library.training.unwritten import Unwritten
from networks.network import Network


class MeasuredData(NamedTuple):
    """The images that are measured: those held out, some of the trained ones, and those of folders, by use and name."""

    held_out: TrainingData | None
    trained: TrainingData | None
    folders: Mapping[Use, Mapping[str, TrainingData]]

    def all(self) -> list[TrainingData]:
        single = [one for one in (self.held_out, self.trained) if one is not None]
        return [*single, *(data for named in self.folders.values() for data in named.values())]


class Made(NamedTuple):
    """Objects of this run, beside its core, that the hooks need."""

    schedule: LRScheduler | None
    observe: Observe | None
    measured: MeasuredData
    prompts: render.EncodedPrompts
    facts: Facts  # of the states
    record: RunFile
    apart: Sequence[Network] = ()  # below the trained one, off in pictures


def make_hooks(plan: Plan, run: Run, curves: Curves, made: Made) -> tuple[Hook[Run], ...]:
    """The hooks for a run that has none yet.

    Order within a step: the schedule and the max norm come before the hooks that measure and average the weights. Order
    of saving: files, then samples, then the snapshot for a rollback.
    """
    return tuple(_hooks(plan, run, curves, made))


def _hooks(plan: Plan, run: Run, curves: Curves, made: Made) -> Iterator[Hook[Run]]:
    options, saves = plan.options, run.saves
    held_out = made.measured.held_out
    validator = None if held_out is None else _validator(options, run, held_out)
    if made.schedule is not None and curves.schedule is not None:
        yield LrSchedule(made.schedule, curves.schedule)
    if curves.decay is not None:
        yield WeightDecay(curves.decay, made.observe, None if validator is None else validator.history)
    if plan.settings:
        yield Multiplier()
    if made.apart:
        yield OffInPictures(made.apart)
    yield from _protections(options, run, made.measured)
    if options.network.scale_weight_norms:
        yield MaxNorm(options.network.scale_weight_norms)
    if options.trains:
        yield from _pictures(plan, run, made.prompts)
        yield from _monitor(plan, run, made.record)
        if run.accelerator.device.type == "cuda":
            yield Spill()
    if options.ema.ema_decay is not None:
        yield Ema(run.parameters, decay=options.ema.ema_decay, purposes=options.ema.purposes)
    if options.trains:
        yield from _writers(plan, run, curves, made, None if validator is None else validator.history)
    if validator is not None:
        yield validator
    yield from _measuring(options, run, made.measured)
    yield Guard(
        options.divergence.on_divergence,
        limit=options.divergence.divergence_limit,
        keeps_after=lambda step: bool(saves.due(step)),
    )


def _protections(options: Options, run: Run, data: MeasuredData) -> Iterator[Hook[Run]]:
    """The hooks that work against forgetting."""
    if terms := [term for term in run.objective.more if isinstance(term, Distillation)]:
        yield Progress(terms)
    if earlier := list(data.folders["ewc"].values()):
        wanted = options.forgetting
        yield Consolidation(run.parameters, earlier, strength=wanted.ewc_lambda, most_images=wanted.ewc_images)


def _validator(options: Options, run: Run, held_out: TrainingData) -> Validator:
    wanted = options.validation
    return Validator(
        held_out,
        History(patience=wanted.early_stopping_patience, threshold=wanted.early_stopping_threshold),
        _times(options, run),
        timesteps=middles(*run.objective.steps),
        most_batches=wanted.max_validation_steps,
    )


def _times(options: Options, run: Run) -> Times:
    return Times(
        every_n_steps=options.validation.validate_every_n_steps,
        every_n_epochs=options.validation.validate_every_n_epochs,
        steps_per_epoch=run.saves.steps_per_epoch,
        total_steps=run.position.total,
    )


def _measuring(options: Options, run: Run, data: MeasuredData) -> Iterator[Hook[Run]]:
    """The hooks that measure further images when validation measures those held out."""
    timesteps, most = middles(*run.objective.steps), options.validation.max_validation_steps
    sets, unrelated = data.folders["validation"], data.folders["forgetting"]
    if sets or data.trained is not None:
        yield ValidationSets(sets, data.trained, timesteps=timesteps, most_batches=most)
    if unrelated:
        times = _times(options, run)
        yield ForgettingMeter(
            unrelated,
            times.due,
            timesteps=timesteps,
            most_batches=most,
            starts_as_base=options.network.network_weights is None,
        )


def _pictures(plan: Plan, run: Run, prompts: render.EncodedPrompts) -> Iterator[Pictures]:
    output = plan.options.output
    paths = pictures(plan.options, run.saves)
    if paths and run.accelerator.is_main_process:
        yield Pictures(
            paths,
            encode=prompts,
            vae_dtype=vae_dtype(run.family, plan.options),
            prompts=output.compare_prompts,
            moved=slider.pictured(plan.settings),
            size=slider.picture_size(plan.settings) if plan.settings else plan.datasets[0].resolution,
            steps=output.compare_steps,
            what="the training" if plan.options.embedding.train_embedding_only else "the LoRA",
        )


def _monitor(plan: Plan, run: Run, record: RunFile) -> Iterator[Monitor]:
    wanted = plan.options.monitoring
    if wanted.monitoring:
        by_name = {group["name"]: group["params"] for group in run.groups}
        yield Monitor(
            Meter(by_name, run.network, run.accelerator, process=run.objective.process),
            every=wanted.every,
            bins=run.objective.process.bins(BINS),
            record=record,
        )


def _writers(plan: Plan, run: Run, curves: Curves, made: Made, history: History | None) -> Iterator[Hook[Run]]:
    """The saver and the sampler, on the main process; under ZeRO all processes take part in saving."""
    options, saves, saver = plan.options, run.saves, None
    unwritten = Unwritten(ends_on_broken_weights=options.divergence.on_divergence == "stop")
    processes = run.accelerator.num_processes
    if run.accelerator.is_main_process:
        saver = Saver(
            saves,
            made.facts,
            precision=options.output.save_precision,
            metadata=run_metadata(plan, saves, run.data, world_size=processes, decay=curves.decay),
            unwritten=unwritten,
            history=history,
            record=made.record,
        )
    if isinstance(run.gradients, zero.ZeroTwo):
        yield zero.Gathering(saver, run.gradients, saves)
    elif saver is not None:
        yield saver
    if plan.samples is not None and run.accelerator.is_main_process:
        yield Sampler(_sampling(plan, plan.samples, run, made.prompts), unwritten)


def _sampling(plan: Plan, times: SampleTimes, run: Run, prompts: render.EncodedPrompts) -> render.Sampling:
    for item in times.prompts:
        render.check_sampler(item.sample_sampler or times.sampler)
    return render.Sampling(
        times=times,
        family=run.family,
        network=run.network,
        at=run.network.at,
        encode=prompts,
        vae_dtype=vae_dtype(run.family, plan.options),
        autocast=run.accelerator.autocast,
        device=run.accelerator.device,
        show=partial(trackers.log_image, run.accelerator),
        folder=run.saves.folder / "sample",
        name=run.saves.name,
        seed=plan.seed,
        since=plan.started_at,
        steps_per_epoch=run.saves.steps_per_epoch,
    )
