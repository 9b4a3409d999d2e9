"""The options that choose settings for the user, or help to choose them."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.fields import option


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Presets and advice"""

    preset: tuple[str, ...] = option(
        (), help="settings that ship with the program, by name, the later ones on top; all else wins over them (ours)"
    )
    list_presets: bool = option(False, help="say which presets there are, instead of training (ours)")
