"""CustomAdamW: AdamW with nine published techniques, a file for each, a weight decay that falls, and 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .optimizer import CustomAdamW as CustomAdamW


def __getattr__(name: str) -> object:
    """Load torch only when the optimizer is imported."""
    if name == "CustomAdamW":
        from .optimizer import CustomAdamW

        return CustomAdamW
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
