"""Tries an optimizer on a small LoRA before anything is loaded: one that cannot train this run is refused."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Collection, Mapping
from functools import partial
from typing import Literal

import torch

from library.config import registry
from library.errors import UserError
from library.optimizers import small_lora
from library.optimizers.create import OptimizerChoice, create_optimizer
from library.optimizers.small_lora import GRADIENT, STEPS, SmallLora

logger = logging.getLogger(__name__)

Verdict = Literal["moves", "stands still", "is not finite"]

PATIENCE = 300
"""Steps after which even the slowest warm-up must have moved something."""

LARGE = 30
"""Factor on the usual gradient: an optimizer that does not move even then does not move in any run."""

_DTYPES = {"full_fp16": torch.float16, "full_bf16": torch.bfloat16}


def refuse_useless(
    choice: OptimizerChoice, rates: Mapping[str, float], *, precision: str = "", kernels: Collection[int] = ()
) -> None:
    """UserError for an optimizer whose step fails, moves nothing or ends in NaN, with the weights in the run's type.

    `rates`: of the parts that are trained, by name. `precision`: the option that keeps the trained weights in 16 bits,
    if it is given. `kernels`: the sizes of convolutions that are trained. Gradients are of the usual size
    (`GRADIENT`); an optimizer that moves only with larger ones gets a warning.
    """
    trained = {name: rate for name, rate in rates.items() if rate > 0}
    if not trained:
        return
    dtype = _DTYPES.get(precision, torch.float32)
    named = f"--optimizer_type {choice.name}" + (f" with --{precision}" if precision else "")
    _refuse_closure(choice, named)
    judged = partial(_verdict, choice, trained, dtype=dtype, kernels=kernels, named=named)
    verdict = judged(gradient=GRADIENT)
    if verdict == "is not finite":
        raise UserError(f"{named}: the weights become NaN or infinite within {STEPS} steps{_why(choice, dtype)}")
    if verdict == "stands still" and judged(gradient=LARGE * GRADIENT) != "moves":
        raise UserError(
            f"{named}: no weight moves, so that nothing would be trained: in {PATIENCE} steps on a small LoRA every "
            f"lora_up stays 0{_remedy(dtype, 'a higher')}"
        )
    if verdict == "stands still":
        logger.warning(
            "%s: with gradients of the usual size no weight moves, only with %d times larger ones; watch whether "
            "the run learns anything",
            named,
            LARGE,
        )


def _refuse_closure(choice: OptimizerChoice, named: str) -> None:
    step = inspect.signature(registry.load_path(choice.path, where="--optimizer_type").step)
    _, *parameters = step.parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise UserError(
            f"{named}: its step() needs '{needed[0]}', to recompute the loss within a step; here a batch is computed "
            "once"
        )


def _verdict(
    choice: OptimizerChoice,
    rates: Mapping[str, float],
    *,
    dtype: torch.dtype,
    kernels: Collection[int],
    gradient: float,
    named: str,
) -> Verdict:
    device = _device()
    lora = SmallLora(rates, dtype=dtype, device=device, gradient=gradient, kernels=kernels)
    before = lora.copied()
    with small_lora.quietly(device):
        optimizer = create_optimizer(choice.in_plain_steps(), lora.groups, learning_rate=max(rates.values()))
        for steps in (STEPS, PATIENCE - STEPS):
            try:
                small_lora.train(optimizer, lora, steps)
                if small_lora.has_modes(optimizer):
                    optimizer.eval()
            except Exception as error:  # third-party code, which raises errors of any class
                reason = str(error) or "without a word"
                raise UserError(
                    f"{named} cannot train a LoRA: its step ends in {type(error).__name__}: {reason}"
                ) from error
            if not all(bool(parameter.isfinite().all()) for parameter in lora.parameters):
                return "is not finite"
            if any(not torch.equal(*pair) for pair in zip(before, lora.parameters, strict=True)):
                return "moves"
    return "stands still"


def _device() -> torch.device:
    """The device that this process will train on, so that its kernels are tried."""
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def _why(choice: OptimizerChoice, dtype: torch.dtype) -> str:
    eps: object = choice.setting("eps")
    if isinstance(eps, float) and eps and torch.tensor(eps, dtype=dtype) == 0:
        return (
            f": its eps of {eps:g} is 0 in fp16. Give --optimizer_args eps=1e-4, an 8-bit optimizer (they compute in "
            "fp32), or --full_bf16 instead"
        )
    return _remedy(dtype, "a lower")


def _remedy(dtype: torch.dtype, other: str) -> str:
    if dtype == torch.float16:
        return (
            ". The numbers in its state are too small for fp16: leave --full_fp16 out, so that the LoRA's weights "
            "are trained in fp32, or try --full_bf16"
        )
    if dtype == torch.bfloat16:
        return ". Leave --full_bf16 out, so that the LoRA's weights are trained in fp32"
    return f": {other} --learning_rate is the usual cure; or its --optimizer_args are wrong, or it is not for LoRAs"
