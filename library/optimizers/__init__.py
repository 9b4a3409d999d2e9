"""The optimizers. Other programs can import `CustomAdamW` from here, and what chooses its numbers: see `_FILES`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.optimizers.custom_adamw import CustomAdamW as CustomAdamW
    from library.optimizers.custom_adamw.preset import preset_arguments as preset_arguments
    from library.optimizers.layers import layer_groups as layer_groups
    from library.optimizers.task_rates import task_rate as task_rate


_FILES = {
    "CustomAdamW": "custom_adamw",
    "preset_arguments": "custom_adamw.preset",
    "layer_groups": "layers",
    "task_rate": "task_rates",
}


def __getattr__(name: str) -> object:
    """`from library.optimizers import CustomAdamW, preset_arguments`: torch loads only when these are imported."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
