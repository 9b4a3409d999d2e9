"""A caption as a list of tags, most of which can be shuffled, withheld at first (warm-up), and dropped."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec


class Tags(NamedTuple):
    """The tags of one caption, stripped. Only those of `loose` are shuffled, withheld and dropped."""

    front: list[str]
    loose: list[str]
    back: list[str]

    def joined(self, separator: str) -> str:
        """The tags with the separator and a space between them: ", " for ",", as in kohya, and "; " for ";"."""
        between = separator if separator[-1:].isspace() else f"{separator} "
        return between.join([*self.front, *self.loose, *self.back])


def split(text: str, spec: SubsetSpec) -> Tags:
    """The tags of `text`, between separators.

    The tags before a `keep_tokens_separator` in the text stay in front, and those behind a second one at the end; empty
    tags are then left out. Without one the first `keep_tokens` tags stay in front.
    """
    mark = spec.keep_tokens_separator
    if mark and mark in text:
        front, rest = text.split(mark, 1)
        loose, _, back = rest.partition(mark)
        return Tags(*(list(filter(None, stripped(part, spec.caption_separator))) for part in (front, loose, back)))
    tags = stripped(text.strip(), spec.caption_separator)
    return Tags(tags[: spec.keep_tokens], tags[spec.keep_tokens :], [])


def stripped(text: str, separator: str) -> list[str]:
    """The tags between separators, without the spaces around them; they may be empty."""
    return [tag.strip() for tag in text.split(separator)]


def warmup_length(spec: SubsetSpec, total_steps: int) -> float:
    """The steps after which all tags are there; a `token_warmup_step` below 1 is a share of all steps."""
    if spec.token_warmup_step < 1:
        return math.floor(spec.token_warmup_step * total_steps)
    return spec.token_warmup_step


def warmed_up(loose: Sequence[str], spec: SubsetSpec, *, step: int, total_steps: int) -> list[str]:
    """The first tags of `loose`: `token_warmup_min` of them at step 0, all from the end of the warm-up on.

    `step` counts the optimizer's steps done before. If there are fewer tags than the minimum, all are returned.
    """
    length = warmup_length(spec, total_steps)
    if step >= length:
        return list(loose)
    more = math.floor(step * ((len(loose) - spec.token_warmup_min) / length))
    return list(loose[: spec.token_warmup_min + more])


def dropped_out(loose: Sequence[str], rate: float, rng: random.Random) -> list[str]:
    """`loose` without the tags that a draw at `rate` (0 … 1) hits, each on its own."""
    return [tag for tag in loose if rng.random() >= rate]
