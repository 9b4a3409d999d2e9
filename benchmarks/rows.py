"""Finished runs of a study as rows of a CSV file: a frozen dataclass of texts and numbers is one row."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


def read(path: Path, kind: type[Row]) -> list[Row]:
    """All rows; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        types = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(kind)}
        return [kind(**{name: of(line[name]) for name, of in types.items()}) for line in csv.DictReader(file)]


def append(path: Path, row: DataclassInstance) -> None:
    """Add a row, with the names of the columns if it is the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
