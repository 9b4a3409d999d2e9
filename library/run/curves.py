"""The curves of a run's learning rate and weight decay, checked before any model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from library.config.options import Options
from library.errors import UserError
from library.optimizers import weight_decay_choice
from library.optimizers.auto_weight_decay import Complexity
from library.optimizers.create import OptimizerChoice
from library.optimizers.schedules import ScheduleChoice, choose_schedule, rehearse
from library.optimizers.weight_decay_choice import DecayChoice
from library.run.plan import Plan
from networks import kinds

logger = logging.getLogger(__name__)

_CONSTANT = ("constant", "constant_with_warmup")  # schedules that never lower the rate


@dataclass(frozen=True)
class Curves:
    """`schedule`: None if the optimizer sets its own rates. `decay`: None if the weight decay is constant.
    `optimizer`: with the numbers of the weight decay's curve."""

    schedule: ScheduleChoice | None
    decay: DecayChoice | None
    optimizer: OptimizerChoice


def curves_of(plan: Plan, *, total_steps: int) -> Curves:
    """The curves of a run of this length. Raises UserError for options that do not fit the optimizer."""
    options = plan.options
    decay = weight_decay_choice.resolve(
        options.weight_decay,
        plan.choice,
        total_steps=total_steps,
        images=plan.prepared.train_images,
        complexity=_complexity(plan),
    )
    choice = weight_decay_choice.apply(decay, options.weight_decay, plan.choice)
    schedule = schedule_of(options, choice, total_steps=total_steps)
    if decay is not None and decay.pace.with_rate and (schedule is None or schedule.name in _CONSTANT):
        logger.warning("--wd_lr_coupling lower has no effect: the learning rate has no schedule that lowers it")
    if choice.averages and options.ema.ema_decay is not None:
        raise UserError(f"--ema_decay: {choice.name} averages the weights by itself: leave one of the two out")
    if choice.relative_step and options.divergence.on_divergence == "rollback":
        raise UserError(
            f"--on_divergence rollback: it halves the rates, and {choice.name} with relative_step sets its own: give "
            "--optimizer_args relative_step=False, or --on_divergence skip"
        )
    return Curves(schedule, decay, choice)


def _complexity(plan: Plan) -> Complexity | None:
    """The trained numbers over those in the latents of the different images to learn, each at its largest size."""
    if plan.parameters is None:
        return None
    latents, sizes = plan.family.latents, dict[Path, int]()
    for sample, placement in zip(plan.prepared.samples, plan.prepared.placements, strict=True):
        if not sample.subset.is_reg:
            width, height = placement.bucket
            values = latents.channels * (width // latents.factor) * (height // latents.factor)
            sizes[sample.path] = max(values, sizes.get(sample.path, 0))
    return Complexity(plan.parameters, sum(sizes.values()))


def schedule_of(options: Options, choice: OptimizerChoice, *, total_steps: int) -> ScheduleChoice | None:
    """The schedule of the learning rate, tested; None if the optimizer makes its own. Raises UserError."""
    wanted = options.schedule
    named_adafactor = wanted.lr_scheduler == "adafactor" and not wanted.lr_scheduler_type
    if named_adafactor and not choice.relative_step:
        off = choice.setting("relative_step") is False
        raise UserError(
            "--lr_scheduler adafactor is the schedule that --optimizer_type Adafactor makes itself with "
            f"relative_step=True; this run's optimizer is {choice.name}{' without it' * off}"
        )
    if choice.schedule_free or choice.relative_step:
        asked = wanted.lr_scheduler != "constant" and not named_adafactor
        if asked or wanted.lr_scheduler_type or wanted.lr_warmup_steps:
            reason = "needs no schedule" if choice.schedule_free else "makes its own schedule (relative_step)"
            logger.warning(
                "%s %s: --lr_scheduler, --lr_scheduler_type and --lr_warmup_steps have no effect.", choice.name, reason
            )
        return None
    chosen, rates = choose_schedule(wanted, total_steps=total_steps), options.optimizer
    rehearse(chosen, rate=max(rates.learning_rate, rates.unet_lr or 0.0, *(rates.text_encoder_lr or ())))
    return chosen


def of_length(plan: Plan, curves: Curves) -> list[str]:
    """What depends on the run's length, and so differs from what a state of another length has."""
    options, resume = plan.options, plan.resume
    assert resume is not None
    names = []
    if curves.schedule is not None and curves.schedule.depends_on_length(options.schedule):
        names.append("learning rate")
    then = weight_decay_choice.decide(
        options.weight_decay,
        plan.choice,
        total_steps=resume.facts.total_steps,
        images=plan.prepared.train_images,
        complexity=_complexity(plan),
    )
    if curves.decay is not None and then is not None and curves.decay.curve != then.curve:
        names.append("weight decay")
    if options.forgetting.distillation_weight and options.forgetting.distillation_schedule != "constant":
        names.append("distillation")
    if any(0 < subset.token_warmup_step < 1 for dataset in plan.datasets for subset in dataset.subsets):
        names.append("token warm-up")
    kind = kinds.kind_of(options.network.network_module, options.network.network_args)
    if kind is not None and kinds.load(kind).BY_LENGTH:
        names.append("ranks")
    return names
