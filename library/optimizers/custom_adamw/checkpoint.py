"""Loads state dicts, without torch's casts, also those of other optimizers or of another number of bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from ..groups import Group, Options, State
from .plan import Settings, eight_bit

logger = logging.getLogger(__name__)


class _Wrapped:
    """Carries a tensor past torch's `load_state_dict`, which would cast moments and codes to the parameter's type."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrap(_: Optimizer, state_dict: StateDict) -> StateDict:
    """A load hook: the same state dict with wrapped tensors."""
    state = {
        key: {name: _Wrapped(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def unwrap(state: Mapping[Tensor, State]) -> None:
    """Replace wrapped tensors by copies on their parameter's device, and counts of steps by plain numbers."""
    for parameter, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, _Wrapped):
                entry[name] = value.tensor.detach().clone().to(parameter.device)
        if isinstance(entry.get("step"), Tensor):
            entry["step"] = int(entry["step"].item())


def complete(groups: list[Group], state: Mapping[Tensor, State], defaults: Options) -> None:
    """Add the options that a state dict of AdamW or of an earlier version lacks."""
    for group in groups:
        if "step" not in group:
            group["step"] = max((state[p]["step"] for p in group["params"] if "step" in state.get(p, {})), default=0)
        for name, value in defaults.items():
            group.setdefault(name, value)


def tell(before: list[Group], groups: list[Group], state: Mapping[Tensor, State], settings: Settings) -> None:
    """Log the changes by loading once: options that the state dict replaced, moments that will be converted."""
    ignored = {"params", "param_names", "lr", "initial_lr", "step", "wd_flat_since", "wd_seen"}
    changed = {
        f"{name} = {new[name]!r} (was {old[name]!r})"
        for old, new in zip(before, groups, strict=True)
        for name in old.keys() & new.keys() - ignored
        if old[name] != new[name]
    }
    if changed:
        logger.warning("CustomAdamW: the loaded state sets %s", ", ".join(sorted(changed)))
    converted = sum(
        ("exp_avg_absmax" in entry) != eight_bit(parameter, settings)
        for parameter, entry in state.items()
        if "exp_avg" in entry
    )
    if converted:
        logger.warning(
            "CustomAdamW: the moments of %d parameters were saved with another precision and become optim_bits=%d "
            "(min_8bit_size=%d)",
            converted,
            settings.optim_bits,
            settings.min_8bit_size,
        )
