"""The optimizer's reports about itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypedDict

from ..groups import Group
from . import native
from .options import decayed_weight_decay
from .pairs import Halves
from .plan import Plan, Settings, named_parameters
from .technique import About
from .techniques import names_on, switched_on

logger = logging.getLogger(__name__)


class Information(TypedDict):
    """See `describe`."""

    techniques: list[str]
    optim_bits: int
    steps: int
    parameters: int  # numbers in all tensors
    tensors: int
    lora_pairs: int
    state_bytes: int
    bytes_per_parameter: float
    weight_decay: list[float]  # of each group
    implementation: list[str]


def _pairs(groups: list[Group], halves: Halves) -> int:
    return len(halves.pairs((name, parameter) for name, parameter, _ in named_parameters(groups)))


def _numbers(groups: list[Group]) -> int:
    return sum(parameter.numel() for _, parameter, _ in named_parameters(groups))


def announce(groups: list[Group], settings: Settings, halves: Halves) -> None:
    """Log the start-up summary, and the consequences of the options for the techniques."""
    on = sorted({name for group in groups for name in names_on(group)})
    tensors = sum(len(group["params"]) for group in groups)
    logger.info(
        "CustomAdamW: %d-bit state, %d tensors with %s numbers, %d LoRA pairs; on: %s",
        settings.optim_bits,
        tensors,
        f"{_numbers(groups):,}",
        _pairs(groups, halves),
        ", ".join(on) or "nothing (plain AdamW)",
    )
    named = all(group.get("param_names") for group in groups)
    hint = "no parameter is named like one" if named else "names are missing: pass model.named_parameters()"
    for message in dict.fromkeys((*_exclusions(groups), *_unmet(groups, hint, halves))):
        logger.warning("CustomAdamW: %s", message)
    for remark in dict.fromkeys(technique.remark() for group in groups for technique in switched_on(group)):
        if remark:
            logger.info("CustomAdamW: %s", remark)


def _exclusions(groups: list[Group]) -> Iterator[str]:
    """The reasons why techniques that are on are not used beside others."""
    for group in groups:
        for technique in switched_on(group):
            yield from (reason for option, reason in technique.excludes.items() if group.get(option))


def _unmet(groups: list[Group], hint: str, halves: Halves) -> list[str]:
    """Warnings of techniques that are on and apply to no parameter."""
    paired = halves.pairs((name, parameter) for name, parameter, _ in named_parameters(groups))
    met: dict[str, bool] = {}
    for group in groups:
        for technique in switched_on(group):
            if complaint := technique.unmet(hint):
                applies = any(
                    technique.applies(
                        About(halves.role(name, parameter), id(parameter) in paired, tuple(parameter.shape))
                    )
                    for name, parameter, _ in named_parameters([group])
                )
                met[complaint] = met.get(complaint, False) or applies
    return [complaint for complaint, applies in met.items() if not applies]


def announce_tier(plan: Plan, settings: Settings) -> None:
    """Log the tier that runs the step, and the reason why a faster one is unavailable."""
    logger.info("CustomAdamW: the step runs as %s", " and ".join(plan.tiers) or "nothing: no parameter has a gradient")
    wanted, devices = settings.implementation, {s.layout.device.type for s in plan.stacks if not s.layout.native}
    if "cpu" in devices and wanted in ("auto", "native"):
        try:
            native.library()
        except native.Unavailable as reason:
            logger.warning("CustomAdamW: no CPU kernel (%s); the step is slower without it", reason)
        else:
            _announce_unknown(plan)
    if "cuda" in devices and wanted == "auto" and not plan.batched["cuda"].compiled:
        logger.warning("CustomAdamW: no Triton, so the step is not compiled; it is slower without it")


def _announce_unknown(plan: Plan) -> None:
    """Warn of techniques that the CPU kernel does not support."""
    recipes = [stack.layout.recipe for stack in plan.stacks if stack.layout.device.type == "cpu"]
    unknown = sorted({one.name for recipe in recipes for one in recipe.techniques if not native.knows(one)})
    if unknown:
        logger.warning(
            "CustomAdamW: the CPU kernel does not support %s with these settings; its parameters use the plain step, "
            "which is slower",
            ", ".join(unknown),
        )


def describe(groups: list[Group], plan: Plan | None, settings: Settings, halves: Halves) -> Information:
    """For `get_optimization_info`. Bytes count all state so far: 0 before the first step."""
    numbers = _numbers(groups)
    size = sum(stack.bytes for stack in plan.stacks) if plan else 0
    return {
        "techniques": sorted({name for group in groups for name in names_on(group)}),
        "optim_bits": settings.optim_bits,
        "steps": max((group["step"] for group in groups), default=0),
        "parameters": numbers,
        "tensors": sum(len(group["params"]) for group in groups),
        "lora_pairs": _pairs(groups, halves),
        "state_bytes": size,
        "bytes_per_parameter": size / numbers if numbers else 0.0,
        "weight_decay": [decayed_weight_decay(group, group["step"]) for group in groups],
        "implementation": plan.tiers if plan else [],
    }


def represent(groups: list[Group], settings: Settings, halves: Halves) -> str:
    """One line for the optimizer and one for each group."""
    lines = [
        f"CustomAdamW({settings.optim_bits}-bit, {_numbers(groups):,} numbers, {_pairs(groups, halves)} LoRA pairs)"
    ]
    for index, group in enumerate(groups):
        name = group.get("name", index)
        on = ", ".join(names_on(group)) or "plain AdamW"
        lines.append(
            f"  group {name}: {len(group['params'])} tensors, lr {group['lr']:g}, betas {group['betas']}, "
            f"weight decay {group['weight_decay']:g}; {on}"
        )
    return "\n".join(lines)
