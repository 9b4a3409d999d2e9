"""The optimizers. Other programs can import `CustomAdamW` and `preset_arguments` from here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.optimizers.custom_adamw import CustomAdamW as CustomAdamW
    from library.optimizers.custom_adamw.preset import preset_arguments as preset_arguments


def __getattr__(name: str) -> object:
    """`from library.optimizers import CustomAdamW, preset_arguments`: torch loads only when these are imported."""
    if name == "CustomAdamW":
        from library.optimizers.custom_adamw import CustomAdamW

        return CustomAdamW
    if name == "preset_arguments":
        from library.optimizers.custom_adamw.preset import preset_arguments

        return preset_arguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
