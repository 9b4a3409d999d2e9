"""Learning-rate curves that diffusers and transformers lack: exponential, step, REX; each after a linear warm-up.

The first two are torch's ExponentialLR and StepLR, which have no warm-up. Each function takes the same arguments from
`schedules.py` as those libraries' functions: counts of optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.errors import UserError


def exponential(optimizer: Optimizer, *, gamma: float, num_warmup_steps: int = 0) -> LambdaLR:
    """gamma ** t, t steps after the warm-up. 0.999 halves the rate in 693 steps."""
    _check("gamma", gamma)
    return _after_warmup(optimizer, num_warmup_steps, lambda t: gamma**t)


def step(optimizer: Optimizer, *, step_size: int, gamma: float = 0.1, num_warmup_steps: int = 0) -> LambdaLR:
    """gamma ** (t // step_size): the rate is multiplied by gamma after every `step_size` steps."""
    _check("gamma", gamma)
    if step_size < 1:
        raise UserError(f"--lr_scheduler_args step_size={step_size}: it must be 1 or more")
    return _after_warmup(optimizer, num_warmup_steps, lambda t: gamma ** (t // step_size))


def rex(optimizer: Optimizer, *, num_training_steps: int, num_warmup_steps: int = 0) -> LambdaLR:
    """(1 - z) / (1/2 + (1 - z) / 2), z being the completed share of the run after the warm-up.

    It falls more slowly than a line at first and faster at the end (Chen, Wolfe, Kyrillidis 2021, arXiv 2107.04197).
    """
    length = max(1, num_training_steps - num_warmup_steps)

    def factor(t: int) -> float:
        left = max(0.0, 1 - t / length)
        return left / (0.5 + 0.5 * left)

    return _after_warmup(optimizer, num_warmup_steps, factor)


def _after_warmup(optimizer: Optimizer, warmup: int, factor: Callable[[int], float]) -> LambdaLR:
    """The curve after a linear warm-up from 0, as in diffusers' schedules."""
    return LambdaLR(optimizer, lambda done: done / warmup if done < warmup else factor(done - warmup))


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"--lr_scheduler_args {name}={value:g}: it must be above 0, at most 1")
