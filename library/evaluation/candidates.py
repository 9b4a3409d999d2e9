"""The LoRAs that are evaluated or drawn: files with multipliers, several together as one candidate. Needs no torch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, nearest_path


@dataclass(frozen=True)
class Part:
    """One adapter file, and how strongly it acts: 1 as trained, 0 not at all."""

    path: Path
    multiplier: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """Adapter files that act together, in this order. `name`: its label in tables and pictures."""

    name: str
    parts: tuple[Part, ...]

    def times(self, multiplier: float) -> Candidate:
        """The same, with every multiplier multiplied."""
        if multiplier == 1:
            return self
        plain = len(self.parts) == 1 and self.parts[0].multiplier == 1
        name = f"{self.name if plain else f'({self.name})'} × {multiplier:g}"
        return Candidate(name, tuple(Part(one.path, one.multiplier * multiplier) for one in self.parts))


BASE = Candidate("base", ())


def read_candidates(words: Sequence[str]) -> tuple[Candidate, ...]:
    """The candidates of words such as "a.safetensors", "a.safetensors:0.7" and "a.safetensors:0.7+b.safetensors:0.5".

    A file is named by its stem, or by its path where two files share their stem. `UserError` for a missing file, with
    the nearest one, a multiplier that is no number, a file that stands twice in one candidate, and equal candidates.
    """
    found = [tuple(_parts(word)) for word in words]
    stems = Counter(path.stem for path in {part.path for parts in found for part in parts})

    def label(part: Part) -> str:
        name = part.path.stem if stems[part.path.stem] == 1 else str(part.path)
        return name if part.multiplier == 1 else f"{name} × {part.multiplier:g}"

    candidates: dict[tuple[Part, ...], Candidate] = {}
    for word, parts in zip(words, found, strict=True):
        if parts in candidates:
            raise UserError(f"{word}: is given twice")
        candidates[parts] = Candidate(" + ".join(map(label, parts)), parts)
    return tuple(candidates.values())


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
