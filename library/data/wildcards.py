"""Captions with alternatives: one of several lines, one of {red|green|blue}. Off without `enable_wildcard`."""

from __future__ import annotations

import random
import re

# Placeholders for doubled braces while the single ones are read: control characters, which no caption contains.
_OPEN, _CLOSE = "\0", "\1"
_WILDCARD = re.compile(r"\{([^}]+)\}")


def pick_line(text: str, rng: random.Random) -> str:
    """One of the lines of `text`, each as likely as the others."""
    return rng.choice(text.split("\n"))


def expand(text: str, rng: random.Random) -> str:
    """`text` with one of the alternatives in place of each "{a|b|c}"; "{{" and "}}" give one brace each.

    Doubled braces are read first and wildcards do not nest, as in kohya: of "{a|{b|c}}" the last two are one brace that
    closes nothing, so only that is replaced.
    """
    masked = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    chosen = _WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), masked)
    return chosen.replace(_OPEN, "{").replace(_CLOSE, "}")
