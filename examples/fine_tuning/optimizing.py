"""The options and the optimizer that language models and vision transformers share, and the end of the program."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from library.errors import UserError, did_you_mean, nearest_path, why_not
from library.optimizers import CustomAdamW, layer_groups, preset_arguments, task_rate

T = TypeVar("T", int, float)
WARMUP = 0.05  # share of all steps, where no task says otherwise


# -- options


def above_zero(word: str) -> float:
    """A type of an option: a number above 0."""
    value = _number(word, float)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not above 0")
    return value


def at_least_zero(word: str) -> int:
    return _at_least(0, word)


def at_least_one(word: str) -> int:
    return _at_least(1, word)


def _at_least(least: int, word: str) -> int:
    value = _number(word, int)
    if value < least:
        raise argparse.ArgumentTypeError(f"{word} is not at least {least}")
    return value


def _number(word: str, kind: type[T]) -> T:
    try:
        return kind(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{word}' is no {'whole ' * (kind is int)}number") from None


def share(word: str) -> float:
    value = _number(word, float)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{word} is no share, from 0 to below 1")
    return value


def share_above_zero(word: str) -> float:
    value = share(word)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{word} is not above 0: what is held out is what is measured")
    return value


def add_optimizer_options(parser: argparse.ArgumentParser, *, preset: str, task: str | None) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--preset", nargs="*", default=[preset], help=f"numbers of the optimizer (default: {preset})")
    said = "the preset's rate" if task is None else task
    group.add_argument(
        "--task", default=task, help=f"takes the rate of a task: classification, generation, ... (default: {said})"
    )
    group.add_argument("--size", help="of the base, for --task: small, medium, large (default: its parameters count)")
    group.add_argument("--learning_rate", type=above_zero, help="instead of these")
    group.add_argument(
        "--layer_decay", type=above_zero, help="factor of the rate from each layer to the one below, 0.9"
    )
    group.add_argument("--epochs", type=at_least_one)
    group.add_argument("--steps", type=at_least_one, help="instead of --epochs")
    group.add_argument("--batch_size", type=at_least_one)
    group.add_argument("--seed", type=int, default=0)


def check_optimizer_options(wanted: argparse.Namespace) -> None:
    """Raises UserError for an unknown preset, task or size, and a decay out of range, before anything is loaded."""
    preset_arguments(*wanted.preset)
    if wanted.task is not None:
        task_rate(wanted.task, wanted.size or "small")
    elif wanted.size is not None:
        raise UserError("--size: needs --task")
    for option, decides in (("with --learning_rate", wanted.learning_rate), ("without --model", wanted.model is None)):
        if decides and wanted.size is not None:
            raise UserError(f"--size: has no effect {option}")
    if wanted.epochs is not None and wanted.steps is not None:
        raise UserError("--epochs: has no effect with --steps; give one of them")
    if (wanted.layer_decay or 1.0) > 1:
        raise UserError(f"--layer_decay: {wanted.layer_decay} would raise the rate towards the input; at most 1")


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options. Raises UserError for an unknown one, with the nearest."""
    wanted, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(
            f"unknown option '{unknown[0]}'{did_you_mean(unknown[0], [f'--{name}' for name in vars(wanted)])}"
        )
    return wanted


def fill(wanted: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set the options that were not given."""
    for name, value in defaults.items():
        if getattr(wanted, name) is None:
            setattr(wanted, name, value)


# -- optimizer


@dataclass
class Optimizing:
    """The optimizer with its schedule; a step clips the gradients to a norm of 1."""

    optimizer: CustomAdamW
    schedule: torch.optim.lr_scheduler.LRScheduler
    trained: list[Tensor]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()

    def weight_decay(self) -> float:
        """As it is now."""
        decay: float = self.optimizer.get_optimization_info()["weight_decay"][0]
        return decay

    def memory(self) -> str:
        """The bytes of its state, beside those of AdamW."""
        state = self.optimizer.get_optimization_info()["state_bytes"]
        usual = 8 * sum(parameter.numel() for parameter in self.trained)
        return f"optimizer state {state:,} bytes, AdamW's would be {usual:,}"


def make(model: nn.Module, wanted: argparse.Namespace, *, parameters: int, steps: int, scheduler: str) -> Optimizing:
    """`parameters`: of the base, which say its size. `scheduler`: where no task says which."""
    of_task = {} if wanted.task is None else {"task": wanted.task, "size": wanted.size or parameters}
    arguments = preset_arguments(*wanted.preset, **of_task)
    if wanted.learning_rate is not None:
        arguments["lr"] = wanted.learning_rate
    warmup = WARMUP
    if wanted.task is not None:
        _, scheduler, warmup = task_rate(wanted.task, wanted.size or parameters)
    # with their names, by which it finds the LoRA pairs
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: Iterable[Any] = trained
    if wanted.layer_decay is not None:
        groups = layer_groups(trained, lr=arguments["lr"], decay=wanted.layer_decay)
    optimizer = CustomAdamW(groups, **arguments)
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    rates = sorted({group["initial_lr"] for group in optimizer.param_groups})
    said = f"{rates[0]:.3g}" + (f" to {rates[-1]:.3g} by layer" if len(rates) > 1 else "")
    print(f"{steps} steps, rate {said}, {scheduler} after a warm-up of {round(warmup * steps)}")
    return Optimizing(optimizer, schedule, [parameter for _, parameter in trained])


# -- the program


def trained_share(model: nn.Module, *, of: int) -> str:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{count:,} weights are trained, {count / of:.2%} of the base's {of:,}"


def unloadable(model: str | None, error: Exception) -> UserError:
    """What to say of a --model that transformers does not load."""
    near = "" if Path(str(model)).exists() else nearest_path(Path(str(model)))
    return UserError(f"--model {model}: cannot be loaded{near or ': ' + in_a_line(error)}")


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def make_folder(folder: Path | None) -> None:
    """Make the folder of --save_to. Raises UserError where that fails, and for one that has files already."""
    if folder is None:
        return
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"--save_to {folder}: is not empty; give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_to {folder}: cannot be made: {why_not(error)}") from None


def ended(train: Callable[[], object]) -> int:
    """The exit code: 2 for a mistake of the user, which is told without a traceback."""
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):  # peft uses them
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    try:
        train()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
