"""Writes the files of data sets in which images of earlier tasks stand: beside a task's own, or alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.config.toml_file import toml_text
from library.files.atomic import replacing

_LEFT_OUT = ("origin", "subsets")
_FOLDERS_ONLY = ("caption_extension", "class_tokens", "is_reg")  # a metadata file has them itself


def write(path: Path, own: Sequence[DatasetSpec], earlier: Sequence[Sequence[DatasetSpec]], share: float) -> None:
    """`own` with the learnt subsets of the earlier tasks beside it, which have `share` of all draws together, each task
    as much as the others."""
    tables = []
    for dataset in own:
        mine = [_table(subset) for subset in dataset.subsets]
        theirs = []
        for task in earlier:
            subsets = [subset for before in task for subset in before.subsets if subset.learns]
            part = share / len(earlier) / len(subsets) if subsets else 0.0
            theirs += [{**_table(subset), "num_repeats": 1, "share": part} for subset in subsets]
        tables.append({**_table(dataset), "subsets": [*mine, *theirs]})
    _write(path, tables)


def write_earlier(path: Path, earlier: Sequence[Sequence[DatasetSpec]]) -> None:
    """The data sets of the earlier tasks as one file."""
    every = [dataset for task in earlier for dataset in task]
    _write(path, [{**_table(dataset), "subsets": [_table(subset) for subset in dataset.subsets]} for dataset in every])


def _write(path: Path, tables: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(toml_text({"datasets": tables}), encoding="utf-8")


def _table(spec: DatasetSpec | SubsetSpec) -> dict[str, Any]:
    """The keys that a data set's file has for it; what is not set is left out."""
    left_out = (*_LEFT_OUT, *(_FOLDERS_ONLY if getattr(spec, "metadata_file", None) else ()))
    values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in left_out}
    default = {field.name: field.default for field in fields(spec)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value not in (None, "", default[name])
    }
