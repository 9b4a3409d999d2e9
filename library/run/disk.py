"""The bytes that a run will write, and the check that the disk has room for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.errors import UserError
from library.units import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from library.record.saves import SavePlan


def file_bytes(tensors: Mapping[str, Tensor], precision: str | None) -> int:
    """The size of a network's file in a --save_precision, without its metadata."""
    width = {"fp16": 2, "bf16": 2, "float": 4}
    return sum(tensor.numel() * width.get(precision or "", tensor.element_size()) for tensor in tensors.values())


def most_at_once(saves: SavePlan, *, after_step: int, of_file: int, of_state: int) -> int:
    """The most bytes that the files and states of steps after `after_step` take at one time.

    An old file is deleted after the new one is written, so for a moment both exist.
    """
    there = {saves.best_file: of_file} if saves.best else {}
    held = most = sum(there.values())
    for due in (due for step in saves.steps_that_save() if step > after_step for due in saves.due(step)):
        for path, size in ((due.path, of_file), (due.state, of_state)):
            if path is not None:
                held += size - there.get(path, 0)
                there[path] = size
        most = max(most, held)
        held -= sum(there.pop(gone, 0) for gone in (due.remove, due.remove_state) if gone is not None)
    return most


def refuse_full_disk(saves: SavePlan, *, after_step: int, of_file: int, of_state: int) -> None:
    """`UserError` if the disk has no room for the run's files. Files that the run replaces count as room."""
    needed = most_at_once(saves, after_step=after_step, of_file=of_file, of_state=of_state)
    replaced = sum(path.stat().st_size for path in saves.planned_files(after_step=after_step) if path.is_file())
    free = shutil.disk_usage(saves.folder).free
    if needed > free + replaced:
        raise UserError(
            f"--output_dir {saves.folder}: the run writes {human_bytes(needed)} at one time, and {human_bytes(free)} "
            "are free. Free some space, save less often, or keep fewer files (--save_last_n_steps, "
            "--save_last_n_epochs)"
        )
