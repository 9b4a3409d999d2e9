"""A LoRA's record of the LoRA files that were merged into its base model before training (`--base_weights`).

Such a LoRA acts as trained only on top of them, so its metadata has them in `ss_base_weights`: a JSON list of tables
with "name", "multiplier", "sha256" and "sshs_model_hash".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from library.files.hashes import safetensors_hashes, sha256
from library.files.header import read_metadata

KEY = "ss_base_weights"
KEY_APART = "ss_training_adapters"
"""The same of files that acted in training alone: the LoRA is used without them."""


@dataclass(frozen=True)
class BaseFile:
    """One of these files. `name`: without its folder. `sha256`: of the whole file. `sshs_model_hash`: of its tensors,
    which stays when metadata are edited; None for pickled files."""

    name: str
    multiplier: float
    sha256: str
    sshs_model_hash: str | None = None

    def is_same(self, other: BaseFile) -> bool:
        """Whether the other adds the same to a base model: the same tensors, equally strong."""
        same = self.sha256 == other.sha256 or (self.sshs_model_hash or "") == other.sshs_model_hash
        return same and self.multiplier == other.multiplier


def with_multipliers(files: Sequence[str], multipliers: Sequence[float]) -> list[tuple[str, float]]:
    """Each file with its multiplier; 1 where there is none."""
    return list(zip(files, [*multipliers, *[1.0] * (len(files) - len(multipliers))], strict=True))


def of_files(files: Sequence[str], multipliers: Sequence[float]) -> list[BaseFile]:
    """The record of these files; each is read once in a process, for its hashes, unless it changes."""
    return [_of_file(Path(file), multiplier) for file, multiplier in with_multipliers(files, multipliers)]


def _of_file(path: Path, multiplier: float) -> BaseFile:
    now = path.stat()
    return BaseFile(path.name, float(multiplier), *_hashes(path, now.st_size, now.st_mtime_ns))


@lru_cache
def _hashes(path: Path, size: int, changed_ns: int) -> tuple[str, str | None]:
    """Of the whole file and, of safetensors, of its tensors. The plan, the metadata and the run's record want them."""
    with path.open("rb") as file:
        safe = file.read(9)[8:] == b"{"
    model_hash = safetensors_hashes(path)["sshs_model_hash"] if safe else None
    return sha256(path), model_hash


def to_text(files: Iterable[BaseFile]) -> str:
    """The value of `KEY`."""
    return json.dumps([asdict(file) for file in files])


def read(path: Path) -> list[BaseFile]:
    """The record in an adapter file's metadata; empty if there is none, or one that this program did not write."""
    return in_metadata(read_metadata(path))


def in_metadata(metadata: Mapping[str, str], key: str = KEY) -> list[BaseFile]:
    """As `read`, from the metadata; or the record of another `key`."""
    try:
        rows = json.loads(metadata.get(key, "[]"))
        return [
            BaseFile(str(row["name"]), float(row["multiplier"]), str(row["sha256"]), row["sshs_model_hash"])
            for row in rows
        ]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def in_words(files: Iterable[BaseFile]) -> str:
    """ "style.safetensors × 0.7, face.safetensors × 1"."""
    return ", ".join(f"{file.name} × {file.multiplier:g}" for file in files)
