"""Restores the dtypes of an optimizer's state after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keep_types(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo torch's cast of a loaded state to the dtype of its parameter.

    Adafactor keeps fp32 for weights in bf16, and ProdigyPlusScheduleFree bf16 for weights in fp32: a resumed run would
    continue with other numbers. `saved`: the state dict that `optimizer` has just loaded, of weights of the same dtype.
    Classes with a `load_state_dict` of their own keep their dtypes and are left alone.
    """
    import torch

    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], before["params"], strict=True):
            if kept := saved["state"].get(number):
                state = optimizer.state[parameter]
                state.update({name: _typed(state[name], value) for name, value in kept.items()})


def _typed(loaded: Any, saved: Any) -> Any:
    """`loaded` with the dtype of each tensor in `saved`, and with its bits if the dtype differed."""
    import torch

    if isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device, copy=True)
    if isinstance(saved, Mapping):
        return {name: _typed(loaded[name], value) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_typed(*pair) for pair in zip(loaded, saved, strict=True))
    return loaded
