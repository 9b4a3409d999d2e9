"""The LoRAs that are evaluated or drawn: files with multipliers, several together as one candidate. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.config.command import Word
from library.config.fields import option
from library.errors import UserError, nearest_path

FILES = Word(
    "LORA",
    "a LoRA file, or a trained embedding; with a multiplier: a.safetensors:0.7; several together: "
    "a.safetensors:0.7+b.safetensors:0.5",
    many=True,
)


@dataclass(frozen=True, kw_only=True)
class WordOptions:
    """Trained embeddings among the files"""

    token_string: str | None = option(
        None,
        help="the word of the embeddings in prompts and captions (default: the one in the file, else the file's name)",
    )


@dataclass(frozen=True)
class Part:
    """One adapter file, and how strongly it acts: 1 as trained, 0 not at all. `name`: in tables and pictures."""

    path: Path
    multiplier: float = 1.0
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name if self.multiplier == 1 else f"{self.name} × {self.multiplier:g}"


@dataclass(frozen=True)
class Candidate:
    """Adapter files that act together, in this order; none is the base alone."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The label in tables and pictures: "fox × 0.7 + style"."""
        return " + ".join(map(str, self.parts)) or "base"

    def times(self, multiplier: float) -> Candidate:
        """The same, with every multiplier multiplied."""
        return Candidate(tuple(replace(one, multiplier=one.multiplier * multiplier) for one in self.parts))


BASE = Candidate(())


def read_candidates(words: Sequence[str]) -> tuple[Candidate, ...]:
    """The candidates of words such as "a.safetensors", "a.safetensors:0.7" and "a.safetensors:0.7+b.safetensors:0.5".

    A file is named by its stem, or by the end of its path where two files share their stem. `UserError` for a missing
    file, with the nearest one, a multiplier that is no number, a file that stands twice in one candidate, and equal
    candidates.
    """
    found = [Candidate(tuple(_parts(word))) for word in words]
    if twice := [word for word, count in zip(words, map(found.count, found), strict=True) if count > 1]:
        raise UserError(f"{twice[-1]}: is given twice")
    names = _names({part.path for one in found for part in one.parts})
    return tuple(Candidate(tuple(replace(part, name=names[part.path]) for part in one.parts)) for one in found)


def _names(paths: Collection[Path]) -> dict[Path, str]:
    """The stem of each file, with as many of its folders as tell it from the others."""
    names = {}
    for path in paths:
        parts = path.absolute().with_suffix("").parts
        others = [other.absolute().with_suffix("").parts for other in paths if other != path]
        count = next((n for n in range(1, len(parts)) if all(own[-n:] != parts[-n:] for own in others)), len(parts))
        names[path] = "/".join(parts[-count:])
    return names


def _parts(word: str) -> Iterator[Part]:
    """The files of one word. A name may hold "+" or ":" itself: an existing file of that name is preferred."""
    pieces, seen = word.split("+"), set[Path]()
    while pieces:
        for count in range(1, len(pieces) + 1):
            part = _part("+".join(pieces[:count]), word)
            if os.path.isfile(part.path):
                break
        else:
            missing = _part(pieces[0], word).path
            raise UserError(f"{word}: no such file: {missing}{nearest_path(missing)}")
        if part.path in seen:
            raise UserError(f"{word}: {part.path} stands in it twice: give it once, with the sum of the multipliers")
        seen.add(part.path)
        yield part
        pieces = pieces[count:]


def _part(text: str, word: str) -> Part:
    path, colon, number = text.rpartition(":")
    if not colon or os.path.isfile(text):
        return Part(Path(text))
    try:
        multiplier = float(number)
    except ValueError:
        if not os.path.isfile(path):
            return Part(Path(text))  # "C:\loras\fox.safetensors"
        multiplier = math.nan
    if not math.isfinite(multiplier):
        raise UserError(f"{word}: the multiplier '{number}' of {path} is not a number")
    return Part(Path(path), multiplier)
