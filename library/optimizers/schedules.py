"""Learning-rate curves: optimizer step → factor. The formulas are diffusers', transformers' and torch's."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from library.config import registry
from library.config.options.schedule import ScheduleOptions
from library.config.registry import Arguments
from library.errors import UserError

logger = logging.getLogger(__name__)

# "adafactor" is none of these: the optimizer Adafactor makes that curve itself.
SCHEDULES = {
    "constant": "diffusers.optimization.get_constant_schedule",
    "constant_with_warmup": "diffusers.optimization.get_constant_schedule_with_warmup",
    "linear": "diffusers.optimization.get_linear_schedule_with_warmup",
    "cosine": "diffusers.optimization.get_cosine_schedule_with_warmup",
    "cosine_with_restarts": "diffusers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup",
    "polynomial": "diffusers.optimization.get_polynomial_decay_schedule_with_warmup",
    "piecewise_constant": "diffusers.optimization.get_piecewise_constant_schedule",
    "cosine_with_min_lr": "transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup",
    "inverse_sqrt": "transformers.optimization.get_inverse_sqrt_schedule",
    "warmup_stable_decay": "transformers.optimization.get_wsd_schedule",
    "exponential": "library.optimizers.rate_curves.exponential",
    "step": "library.optimizers.rate_curves.step",
    "rex": "library.optimizers.rate_curves.rex",
}
_WITHOUT_WARMUP = ("constant", "piecewise_constant")
_ENDLESS = ("exponential", "step", "inverse_sqrt")  # they do not depend on the run's length, only on the warm-up


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule whose function or class is importable and whose arguments fit it by name."""

    name: str
    path: str
    arguments: Arguments
    total_steps: int
    warmup: int = 0  # optimizer steps

    def depends_on_length(self, options: ScheduleOptions) -> bool:
        """Whether a run of another length has another curve, apart from the warm-up of a constant one."""
        if self.path not in SCHEDULES.values() or self.name in (*_WITHOUT_WARMUP, "constant_with_warmup"):
            return False
        share = isinstance(options.lr_warmup_steps, str) or 0 < options.lr_warmup_steps < 1
        return share or self.name not in _ENDLESS


def steps_of(value: int | float | str, total_steps: int, *, option: str) -> int:
    """Optimizer steps, from a number of steps (500), a ratio below 1 (0.05) or a percentage ("5%").

    Raises UserError for a negative one or one longer than the run.
    """
    if isinstance(value, str) and value.endswith("%"):
        steps = percent_of(value, total_steps)
    elif float(value) < 1:
        steps = int(float(value) * total_steps)
    else:
        steps = int(value)
    if not 0 <= steps <= total_steps:
        raise UserError(f"--{option} {value}: {steps} steps do not fit a run of {total_steps} steps")
    return steps


def percent_of(percentage: str, total_steps: int) -> int:
    """Optimizer steps of "5%"."""
    return int(float(percentage[:-1]) * total_steps / 100)  # multiplied first: 29 / 100 * 100 is below 29


def choose_schedule(options: ScheduleOptions, *, total_steps: int) -> ScheduleChoice:
    """Find the function or class and check the words against its signature, without calling it. Raises UserError."""
    warmup = steps_of(options.lr_warmup_steps, total_steps, option="lr_warmup_steps")
    for sentence in options.without_effect():
        logger.warning("%s", sentence)
    if options.lr_scheduler_type:
        return _custom(options, total_steps=total_steps, warmup=warmup)
    name = options.lr_scheduler
    assert name in SCHEDULES, name
    if warmup and name in _WITHOUT_WARMUP:
        other = ": use --lr_scheduler constant_with_warmup, or" if name == "constant" else ":"
        raise UserError(
            f"--lr_scheduler {name} has no warm-up, but --lr_warmup_steps gives it {warmup} steps{other} "
            "--lr_warmup_steps 0."
        )
    decay = 0
    if name == "warmup_stable_decay":
        decay = steps_of(options.lr_decay_steps, total_steps, option="lr_decay_steps")
        if warmup + decay > total_steps:
            raise UserError(
                f"--lr_warmup_steps {options.lr_warmup_steps} and --lr_decay_steps {options.lr_decay_steps}: "
                f"{warmup} + {decay} steps do not fit a run of {total_steps} steps"
            )
        if not decay:
            logger.warning("--lr_scheduler warmup_stable_decay never decays without --lr_decay_steps, such as 20%")
    given = _arguments(options, total_steps=total_steps, warmup=warmup, decay=decay)
    words, _ = registry.bind(
        SCHEDULES[name],
        options.lr_scheduler_args,
        reserved=("optimizer", "last_epoch", *given),
        where="--lr_scheduler_args",
        named_by="--lr_scheduler",
        called=f"--lr_scheduler {name}",
    )
    if name == "piecewise_constant":
        words["step_rules"] = _checked_rules(str(words["step_rules"]))
    if name == "cosine_with_min_lr" and "min_lr_rate" not in given and words.get("min_lr") is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, such as 0.1")
    return ScheduleChoice(name, SCHEDULES[name], {**given, **words}, total_steps, warmup)


def _arguments(options: ScheduleOptions, *, total_steps: int, warmup: int, decay: int) -> Arguments:
    """The arguments of a named schedule's function, apart from --lr_scheduler_args."""
    name, cycles, ratio = options.lr_scheduler, options.lr_scheduler_num_cycles, options.lr_scheduler_min_lr_ratio
    if name in _WITHOUT_WARMUP:
        return {}
    arguments: Arguments = {"num_warmup_steps": warmup}
    if name == "inverse_sqrt":
        return arguments | {"timescale": options.lr_scheduler_timescale}
    if name == "warmup_stable_decay":
        stable = total_steps - warmup - decay
        arguments |= {"num_stable_steps": stable, "num_decay_steps": decay}
        return arguments | {"num_cycles": cycles / 2, "min_lr_ratio": ratio or 0.0}
    if name in ("constant_with_warmup", "exponential", "step"):
        return arguments
    arguments["num_training_steps"] = total_steps
    if name == "cosine_with_restarts":
        arguments["num_cycles"] = cycles
    elif name == "polynomial":
        arguments["power"] = options.lr_scheduler_power
    elif name == "cosine_with_min_lr":
        arguments["num_cycles"] = cycles / 2  # kohya's: one cycle is one descent
        if ratio is not None:
            arguments["min_lr_rate"] = ratio
    return arguments


def _checked_rules(rules: str) -> str:
    """ "1:10,0.1:20,0.01": the factor 1 until step 10, then 0.1 until step 20, then 0.01."""
    number = r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
    if not re.fullmatch(rf"({number}:\d+,)*{number}", rules):
        raise UserError(
            f"--lr_scheduler_args step_rules={rules}: give factors with the steps they end at, and a last factor, such "
            "as step_rules=1:10,0.1:20,0.01"
        )
    ends = [int(rule.split(":")[1]) for rule in rules.split(",")[:-1]]
    if ends != sorted(set(ends)):
        raise UserError(f"--lr_scheduler_args step_rules={rules}: its steps must rise")
    return rules


def _custom(options: ScheduleOptions, *, total_steps: int, warmup: int) -> ScheduleChoice:
    """A class of torch.optim.lr_scheduler by its name, or any other by its path."""
    given = options.lr_scheduler_type
    path = given if "." in given else f"torch.optim.lr_scheduler.{given}"
    if warmup:
        raise UserError(
            f"--lr_scheduler_type {given} has no warm-up, but --lr_warmup_steps gives it {warmup} steps: "
            "use --lr_warmup_steps 0."
        )
    target = registry.load_path(path, where="--lr_scheduler_type")
    step = getattr(target, "step", None)
    if not isinstance(target, type) or not callable(step):
        raise UserError(
            f"--lr_scheduler_type {given} is not a class with a step(), as those of torch.optim.lr_scheduler"
        )
    _, *parameters = inspect.signature(step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise UserError(f"--lr_scheduler_type {given} needs '{needed[0]}' at each step, which is not supported here")
    arguments, unchecked = registry.bind(
        path,
        options.lr_scheduler_args,
        reserved=("optimizer",),
        where="--lr_scheduler_args",
        named_by="--lr_scheduler_type",
    )
    if unchecked:
        logger.warning(
            "--lr_scheduler_args: %s takes any name, so these are not checked: %s", path, ", ".join(unchecked)
        )
    return ScheduleChoice(given, path, arguments, total_steps)


def rehearse(choice: ScheduleChoice, *, rate: float) -> None:
    """Make one of the schedules by name once, so that invalid arguments fail before anything large is loaded."""
    if choice.path in SCHEDULES.values():
        create_schedule(choice, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate))


def create_schedule(choice: ScheduleChoice, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step whatever the number of processes and of batches a step.

    Raises UserError if the function or class does not take its arguments, or a class fails before the end.
    """
    make = registry.load_path(choice.path, where="--lr_scheduler_type")
    try:
        if choice.path not in SCHEDULES.values():
            _run_through(choice, make, optimizer)
        schedule: LRScheduler = make(optimizer, **choice.arguments)
    except UserError:
        raise
    except Exception as error:  # third-party code, which raises errors of any class
        raise UserError(f"--lr_scheduler {choice.name} does not take these settings: {error}") from error
    return schedule


def _run_through(choice: ScheduleChoice, make: Callable[..., LRScheduler], optimizer: torch.optim.Optimizer) -> None:
    """The whole curve on stand-ins for the parameters: many mistakes show only at some step."""
    groups = [{**group, "params": [torch.nn.Parameter(torch.zeros(1))]} for group in optimizer.param_groups]
    stand_in = torch.optim.SGD(groups, lr=0.0)  # does nothing without gradients
    stand_in.defaults |= optimizer.defaults
    schedule = make(stand_in, **choice.arguments)
    for _ in range(choice.total_steps):
        stand_in.step()
        schedule.step()
