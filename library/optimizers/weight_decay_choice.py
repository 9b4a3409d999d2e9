"""Makes the weight-decay curve of a run from its options: checks them, and turns "auto" and "20%" into numbers.

The optimizers take numbers only, so this is done once, before they are made.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from library.config import registry
from library.config.options.weight_decay import READ_BY, WeightDecayOptions
from library.config.registry import Arguments
from library.errors import UserError
from library.optimizers import auto_weight_decay
from library.optimizers.auto_weight_decay import Complexity
from library.optimizers.create import OptimizerChoice
from library.optimizers.plateau import Plateau
from library.optimizers.schedules import percent_of
from library.optimizers.weight_decay import VANISHED, WITH_AN_END, Curve, Stages, check
from library.optimizers.weight_decay_hook import WeightDecayHook
from library.optimizers.weight_decay_pace import STEADY, Pace

logger = logging.getLogger(__name__)

_OWNER = "--dynamic_weight_decay"
_FOREVER = 10**9  # steps, more than any run has
_PLATEAU = "library.optimizers.plateau.Plateau"


@dataclass(frozen=True)
class DecayChoice:
    """The curve of a run, and the origin of each of its numbers. `flat`: arguments of `Plateau`. `pace`: what the curve
    follows beside the steps."""

    curve: Curve
    flat: Arguments = field(default_factory=dict)
    pace: Pace = STEADY
    reasons: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        """The curve for the metadata of the run's files."""
        numbers = {f"wd_{name}": value for name, value in self.curve._asdict().items() if f"wd_{name}" in self.reasons}
        if self.curve.stages:
            numbers["wd_stages"] = _stages_text(self.curve.stages)
        if self.flat:
            numbers["wd_flat"] = " ".join(f"{name}={value}" for name, value in self.flat.items())
        if self.pace.by_gradient:
            numbers["wd_speed"] = "gradient"
        if self.pace.with_rate:
            numbers["wd_lr_coupling"] = "lower"
        return {"dynamic_weight_decay": True, **numbers}

    @property
    def held(self) -> int:
        """The last step with the weight decay as configured; with the adaptive curve the last one at the earliest."""
        if self.curve.schedule == "multi_stage":
            return max(0, next((start - 1 for start, ratio in self.curve.stages if ratio != 1), 0))
        if self.curve.schedule == "adaptive":
            plateau = Plateau(**self.flat)
            return max(plateau.earliest, plateau.window - 1)
        return self.curve.transition_steps

    def changes(self, total_steps: int) -> bool:
        """Whether the weight decay changes, or with an adaptive curve may change, within a run of this length."""
        starts = (start for start, _ in self.curve.stages if start <= total_steps)
        earliest = self.held if self.curve.schedule == "adaptive" else None
        return any(self.curve.factor(step, flat_since=earliest) != 1 for step in (total_steps, *starts))


def check_options(
    options: WeightDecayOptions, choice: OptimizerChoice, *, clips_gradients: bool, validates: bool = False
) -> None:
    """Check everything that does not depend on the run's length. Raises UserError."""
    given = options.given()
    asked = {**given, **({} if options.task is None else {"task": options.task})}
    on = _is_on(options, choice)
    if not on:
        if asked and options.dynamic_weight_decay is None:
            raise UserError(f"--{next(iter(asked))} needs --dynamic_weight_decay with {choice.name}")
        for name in asked:
            logger.warning("--%s has no effect with --no-dynamic_weight_decay", name)
        return
    base = weight_decay_of(choice)
    if base is None:
        raise UserError(f"{_OWNER}: {choice.name} has no weight_decay that could change with the steps")
    if base == 0 and (asked or options.dynamic_weight_decay):
        raise UserError(
            f"{_OWNER}: the weight decay of {choice.name} is 0, which no curve changes: "
            "--weight_decay 0.01, or --no-dynamic_weight_decay"
        )
    for name, value in given.items():
        said = choice.arguments.get(name)
        if said is not None and said != value:
            raise UserError(f"--{name} {_shown(value)} contradicts --optimizer_args {name}={said}: give one of them")
    flat = Plateau(**_words(options))
    if flat.validation is not None and not validates:
        raise UserError("--wd_flat validation needs images to validate on: --validation_split 0.1")
    for asked_for, name in ((flat.gradient is not None, "wd_flat"), (options.wd_speed == "gradient", "wd_speed")):
        if asked_for and not clips_gradients:
            raise UserError(
                f"--{name} gradient needs --max_grad_norm above 0: the norm is measured where gradients are clipped"
            )
    schedule = options.wd_schedule or _own(choice).schedule
    for name in given:
        if name != "wd_schedule" and schedule not in READ_BY[name]:
            logger.warning(
                "--%s has no effect with --wd_schedule %s: it is for %s", name, schedule, ", ".join(READ_BY[name])
            )


def resolve(
    options: WeightDecayOptions,
    choice: OptimizerChoice,
    *,
    total_steps: int,
    images: int,
    complexity: Complexity | None = None,
) -> DecayChoice | None:
    """`decide`, and log the numbers with their rules."""
    decided = decide(options, choice, total_steps=total_steps, images=images, complexity=complexity)
    _warn_of_vanishing(decided, weight_decay_of(choice), total_steps)
    if decided is None:
        return None
    _say(decided, total_steps, asked=bool(options.given() or options.dynamic_weight_decay))
    if options.task is not None and not any(f"task {options.task}" in reason for reason in decided.reasons.values()):
        logger.warning(
            "--task %s has no effect: --wd_decay_factor auto goes by it, unless it is a whole domain, and "
            "--wd_transition_steps auto in runs of 3,000 to 20,000 steps",
            options.task,
        )
    return decided


def decide(
    options: WeightDecayOptions,
    choice: OptimizerChoice,
    *,
    total_steps: int,
    images: int,
    complexity: Complexity | None = None,
) -> DecayChoice | None:
    """The curve in numbers for a run of this length; None if the weight decay is constant.

    `images`: the number of distinct training images. `complexity` None: the network is not known yet. Options must have
    passed `check_options`. Raises UserError.
    """
    if not _is_on(options, choice):
        return None
    own, reasons = _own(choice), {}
    values: Arguments = {"schedule": options.wd_schedule or own.schedule}
    reasons["wd_schedule"] = _where(options.wd_schedule, choice, "wd_schedule")
    numbers = [name for name in READ_BY if name.removeprefix("wd_") in Curve._fields]
    read = [name for name in numbers if values["schedule"] in READ_BY[name]]
    for name in read:
        field_name, given = name.removeprefix("wd_"), getattr(options, name)
        values[field_name], reasons[name] = getattr(own, field_name), _where(given, choice, name)
        if given == "complexity":
            if complexity is None:
                raise UserError(
                    "--wd_min_ratio complexity: a --network_module of another package is made after this is decided: "
                    "give a number, or auto"
                )
            values[field_name], reasons[name] = auto_weight_decay.min_ratio_of(complexity, images=images)
        elif given == "auto":
            values[field_name], reasons[name] = _auto(name, options.task, total_steps=total_steps, images=images)
        elif name == "wd_stages" and given:
            values[field_name] = _stages(given, total_steps)
        elif isinstance(given, str):
            values[field_name], reasons[name] = max(1, _steps(given, total_steps)), f"{given} of {total_steps} steps"
        elif given is not None and given is not False:
            values[field_name] = given
    curve = Curve(**values)
    if curve.schedule in WITH_AN_END and curve.max_progress == float("inf"):
        left = max(total_steps - curve.transition_steps, 1)
        curve = curve._replace(max_progress=left / curve.transition_steps)
        reasons["wd_max_progress"] = "inf: to the end of the run"
    check(curve, owner=_OWNER)
    by_gradient = options.wd_speed == "gradient" and curve.schedule in READ_BY["wd_speed"]
    return DecayChoice(curve, _words(options), Pace(by_gradient, options.wd_lr_coupling == "lower"), reasons)


def apply(decided: DecayChoice | None, options: WeightDecayOptions, choice: OptimizerChoice) -> OptimizerChoice:
    """The optimizer choice with the numbers: CustomAdamW gets them as arguments, other choices are unchanged."""
    if not choice.is_custom_adamw:
        return choice
    arguments: Arguments = {}
    if options.dynamic_weight_decay is not None:
        arguments["dynamic_weight_decay"] = options.dynamic_weight_decay
    if decided is not None:
        changed = [name for name, reason in decided.reasons.items() if reason != "default"]
        arguments |= {name: getattr(decided.curve, name.removeprefix("wd_")) for name in changed}
        arguments |= {"wd_flat": decided.flat} if decided.flat else {}
    return replace(choice, arguments={**choice.arguments, **arguments})


class Observe(Protocol):
    """Receives the numbers that an adaptive curve depends on, before each step."""

    def __call__(
        self, loss: float, gradient_norm: float | None = None, validation_loss: float | None = None
    ) -> None: ...


def attach(decided: DecayChoice | None, optimizer: torch.optim.Optimizer) -> Observe | None:
    """Attach the curve to the optimizer. Returns the function to call with (loss, gradient norm) before each step, or
    None if the curve does not depend on them."""
    if decided is None:
        return None
    from library.optimizers.custom_adamw import CustomAdamW

    curve, pace = decided.curve, decided.pace
    follower: CustomAdamW | WeightDecayHook
    if isinstance(optimizer, CustomAdamW):
        follower, counter = optimizer, "step"
        if pace:
            optimizer.register_step_pre_hook(partial(_set_factor, curve, pace))
    else:
        follower, counter = WeightDecayHook(optimizer, curve, Plateau(**decided.flat), pace), "wd_step"
    adaptive = curve.schedule == "adaptive"
    if not pace.by_gradient:
        return follower.observe if adaptive else None

    def observe(loss: float, gradient_norm: float | None = None, validation_loss: float | None = None) -> None:
        if adaptive:
            follower.observe(loss, gradient_norm, validation_loss)
        if gradient_norm is not None:
            pace.observe(optimizer.param_groups, curve, gradient_norm, counter=counter)

    return observe


def _set_factor(curve: Curve, pace: Pace, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Before a step of CustomAdamW, which counts it itself."""
    for group in optimizer.param_groups:
        group["wd_factor"] = pace.factor(group, curve, group["step"] + 1)


def _is_on(options: WeightDecayOptions, choice: OptimizerChoice) -> bool:
    word = choice.arguments.get("dynamic_weight_decay") if choice.is_custom_adamw else None
    flag = options.dynamic_weight_decay
    if flag is not None and word is not None and flag != word:
        raise UserError(f"{_OWNER} {flag} contradicts --optimizer_args dynamic_weight_decay={word}: give one of them")
    if flag is None and choice.is_custom_adamw:
        return bool(_defaults()["dynamic_weight_decay"] if word is None else word)
    return bool(flag)


def _own(choice: OptimizerChoice) -> Curve:
    """The curve without any option: CustomAdamW's own with --optimizer_args, or the default one."""
    if not choice.is_custom_adamw:
        return Curve()
    settings = {**_defaults(), **choice.arguments}
    return Curve(**{name: settings[f"wd_{name}"] for name in Curve._fields})


def _defaults() -> Arguments:
    from library.optimizers.custom_adamw import CustomAdamW

    return {name: item.default for name, item in inspect.signature(CustomAdamW).parameters.items()}


def weight_decay_of(choice: OptimizerChoice) -> float | None:
    """The weight decay that the optimizer will have; None if it has none."""
    value = choice.setting("weight_decay")
    return value if isinstance(value, int | float) else None


def _words(options: WeightDecayOptions) -> Arguments:
    """--wd_flat as arguments of `Plateau`."""
    arguments, _ = registry.bind(_PLATEAU, options.wd_flat, where="--wd_flat", called="--wd_schedule adaptive")
    return arguments


def _where(given: object, choice: OptimizerChoice, name: str) -> str:
    if given is None or given is False or given == ():
        return "--optimizer_args" if name in choice.arguments else "default"
    return "given"


def _auto(name: str, task: str | None, *, total_steps: int, images: int) -> tuple[float, str]:
    if name == "wd_transition_steps":
        return auto_weight_decay.transition_steps(total_steps, task)
    if name == "wd_decay_factor":
        return auto_weight_decay.decay_factor(images, task)
    return auto_weight_decay.min_ratio(images)


def _steps(word: str, total_steps: int) -> int:
    return percent_of(word, total_steps) if word.endswith("%") else int(word)


def _stages(words: tuple[str, ...], total_steps: int) -> tuple[tuple[int, float], ...]:
    pairs = (word.partition(":") for word in words)
    return tuple((_steps(start, total_steps), float(ratio)) for start, _, ratio in pairs)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _say(decided: DecayChoice, total_steps: int, *, asked: bool) -> None:
    curve = decided.curve
    parts = []
    for name, reason in decided.reasons.items():
        value = getattr(curve, name.removeprefix("wd_"))
        shown = _stages_text(value) if name == "wd_stages" else f"{value:g}" if isinstance(value, float) else value
        parts.append(f"{name} {shown} ({reason})")
    logger.info("weight decay: %s", ", ".join(parts))
    if not asked or decided.changes(total_steps):
        return
    if decided.changes(_FOREVER):
        logger.warning(
            "the weight decay is constant in this run: it would change after step %d, and the run has %d steps",
            decided.held,
            total_steps,
        )
    else:
        logger.warning("the weight decay is constant: with these numbers its curve never falls")


def _warn_of_vanishing(decided: DecayChoice | None, base: float | None, total_steps: int) -> None:
    """Warn of a weight decay above 0, as configured or at the end of its curve, that is too small for an effect."""
    if base is None or base <= 0:
        return
    if base < VANISHED:
        logger.warning("the weight decay is %g, below %g: it regularises nothing", base, VANISHED)
        return
    if decided is None or base * decided.curve.lowest(_FOREVER) >= VANISHED:
        return
    within = base * decided.curve.lowest(total_steps) < VANISHED
    logger.warning(
        "the weight decay falls from %g to %.3g, %s: below %g it regularises nothing. Raise --weight_decay, or the "
        "share that is kept, --wd_min_ratio",
        base,
        base * decided.curve.lowest(total_steps if within else _FOREVER),
        f"within the {total_steps} steps of this run" if within else f"after the {total_steps} steps of this run",
        VANISHED,
    )


def _stages_text(stages: Stages) -> str:
    return ",".join(f"{step}:{ratio:g}" for step, ratio in stages)
