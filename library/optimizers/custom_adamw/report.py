"""What the optimizer says about itself."""

from __future__ import annotations

import logging
from typing import Any

from . import native
from .options import decayed_weight_decay
from .pairs import find_pairs, role_of
from .plan import Group, Plan, Settings, named_parameters, techniques_of

logger = logging.getLogger(__name__)


def _pairs(groups: list[Group]) -> int:
    return len(find_pairs((name, parameter) for name, parameter, _ in named_parameters(groups)))


def _numbers(groups: list[Group]) -> int:
    return sum(parameter.numel() for _, parameter, _ in named_parameters(groups))


def announce(groups: list[Group], settings: Settings) -> None:
    """The start-up summary, and what the choice of options means for the techniques."""
    on = sorted({name for group in groups for name in techniques_of(group)})
    tensors = sum(len(group["params"]) for group in groups)
    logger.info(
        "CustomAdamW: %d-bit state, %d tensors with %s numbers, %d LoRA pairs; on: %s",
        settings.optim_bits,
        tensors,
        f"{_numbers(groups):,}",
        _pairs(groups),
        ", ".join(on) or "nothing (plain AdamW)",
    )
    if any(group["use_grams"] and group["use_cautious"] for group in groups):
        logger.warning("CustomAdamW: Grams leaves nothing for Cautious to mask; with both on, Grams is used alone")
    named = all(group.get("param_names") for group in groups)
    hint = "no parameter is named like one" if named else "names are missing: pass model.named_parameters()"
    if any(group["use_alora"] for group in groups) and _pairs(groups) == 0:
        logger.warning("CustomAdamW: ALoRA needs LoRA pairs and found none (%s); it does nothing", hint)
    for target in ("down", "up"):
        wanting = [g for g in groups if g["use_orthogonal_grad"] and g["orthograd_target"] == target]
        roles = [role_of(name) for name, _, _ in named_parameters(wanting)]
        if wanting and target not in roles:
            logger.warning(
                "CustomAdamW: OrthoGrad is on for lora_%s only and found none (%s); it does nothing. "
                "orthograd_target='all' applies it to every parameter",
                target,
                hint,
            )
    if any(group["use_alora"] and group["lora_plus_ratio"] is not None for group in groups):
        logger.info("CustomAdamW: groups with a LoRA+ ratio keep it; alora_ratio is not multiplied on top")


def announce_tier(plan: Plan, settings: Settings) -> None:
    """What runs the step, and what a faster one lacks."""
    logger.info("CustomAdamW: the step runs as %s", " and ".join(plan.tiers) or "nothing: no parameter has a gradient")
    if settings.implementation != "auto":
        return
    devices = {stack.layout.device.type for stack in plan.stacks if not stack.layout.native}
    if "cpu" in devices:
        try:
            native.library()
        except native.Unavailable as reason:
            logger.warning("CustomAdamW: no CPU kernel (%s); the step is slower without it", reason)
    if "cuda" in devices and not plan.batched["cuda"].compiled:
        logger.warning("CustomAdamW: no Triton, so the step is not compiled; it is slower without it")


def describe(groups: list[Group], plan: Plan | None, settings: Settings) -> dict[str, Any]:
    """For `get_optimization_info`. Bytes count all state so far: 0 before the first step."""
    numbers = _numbers(groups)
    size = sum(stack.bytes for stack in plan.stacks) if plan else 0
    return {
        "techniques": sorted({name for group in groups for name in techniques_of(group)}),
        "optim_bits": settings.optim_bits,
        "steps": max((group["step"] for group in groups), default=0),
        "parameters": numbers,
        "tensors": sum(len(group["params"]) for group in groups),
        "lora_pairs": _pairs(groups),
        "state_bytes": size,
        "bytes_per_parameter": size / numbers if numbers else 0.0,
        "weight_decay": [decayed_weight_decay(group, group["step"]) for group in groups],
        "implementation": plan.tiers if plan else [],
    }


def represent(groups: list[Group], settings: Settings) -> str:
    """One line for the optimizer and one for each group."""
    lines = [f"CustomAdamW({settings.optim_bits}-bit, {_numbers(groups):,} numbers, {_pairs(groups)} LoRA pairs)"]
    for index, group in enumerate(groups):
        name = group.get("name", index)
        on = ", ".join(techniques_of(group)) or "plain AdamW"
        lines.append(
            f"  group {name}: {len(group['params'])} tensors, lr {group['lr']:g}, betas {group['betas']}, "
            f"weight decay {group['weight_decay']:g}; {on}"
        )
    return "\n".join(lines)
