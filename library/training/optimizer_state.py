"""The loaded state of an optimizer, in the types that the optimizer keeps it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keep_types(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo that torch casts a state to the type of its parameter when it is loaded.

    Adafactor keeps fp32 for weights in bf16, and ProdigyPlusScheduleFree bf16 for weights in fp32: a resumed run would
    go on with other numbers. `saved`: the state dict that `optimizer` has just loaded, of weights of the same type.
    Classes that load in a way of their own know their types.
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
    """`loaded` with the type of each tensor in `saved`, and its bits where the type was another."""
    import torch

    if isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device, copy=True)
    if isinstance(saved, Mapping):
        return {name: _typed(loaded[name], value) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_typed(*pair) for pair in zip(loaded, saved, strict=True))
    return loaded
