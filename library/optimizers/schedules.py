"""Learning-rate curves: optimizer step → factor. The formulas are diffusers'."""

from __future__ import annotations

import torch

from library.errors import UserError

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def warmup_steps(value: int | float | str, total_steps: int) -> int:
    """Optimizer steps of warm-up, from a number of steps (500), a ratio below 1 (0.05) or a percentage ("5%").

    Raises UserError for a negative one or one longer than the run.
    """
    if isinstance(value, str) and value.endswith("%"):
        steps = int(float(value[:-1]) / 100 * total_steps)
    elif float(value) < 1:
        steps = int(float(value) * total_steps)
    else:
        steps = int(value)
    if not 0 <= steps <= total_steps:
        raise UserError(f"--lr_warmup_steps {value}: {steps} steps of warm-up do not fit a run of {total_steps} steps")
    return steps


def create_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, total_steps: int, warmup: int, num_cycles: int, power: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule `name`, to be stepped once per optimizer step whatever the number of processes.

    `num_cycles` is read by cosine_with_restarts, `power` by polynomial.
    """
    from diffusers.optimization import get_scheduler

    if name == "constant" and warmup:
        raise UserError(
            f"--lr_scheduler constant has no warm-up, but --lr_warmup_steps asks for {warmup} steps of it: "
            "use --lr_scheduler constant_with_warmup, or --lr_warmup_steps 0."
        )
    assert name in SCHEDULES, name
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    )
