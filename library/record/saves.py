"""The schedule and names of a run's files, and the writing and checking of a network's file."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from library.errors import UserError, nearest_path, why_not
from library.files.atomic import replacing
from library.files.hashes import UNKNOWN_HASHES, write_hashes

logger = logging.getLogger(__name__)

PRECISIONS: dict[str | None, torch.dtype | None] = {
    None: None,  # as trained
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


ENDINGS = ("safetensors", "ckpt", "pt")  # --save_model_as
STATE_SUFFIX = "-state"
EMBEDDING_SUFFIX = "-embedding"
_MOMENT = r"-step\d{8,}|-\d{6,}"  # the step, or epoch, after which a file was written
_MOST_FILES = 1_000_000  # each name is checked before training
_LONGEST_NAME = 200  # bytes; file systems take 255, and the longest thing that follows is a sample's time and seed

# -- when and under which names


@dataclass(frozen=True)
class Due:
    """A file to write now."""

    path: Path
    epoch: int  # what kohya writes as ss_epoch: finished epochs
    remove: Path | None = None  # an older file to delete once this one is written
    state: Path | None = None  # the folder for the run's state
    remove_state: Path | None = None


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """The files that a run writes after each step, with kohya's names and retention.

    Steps count optimizer steps from 1. None or 0 for an interval switches it off.
    """

    folder: Path
    name: str | None  # --output_name
    total_steps: int
    steps_per_epoch: int
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    last_n_steps: int | None = None  # keep the files of the last n *steps*
    last_n_epochs: int | None = None  # keep the last n *files* of epochs
    states: bool = False  # a state beside every file
    state_at_end: bool = False
    last_n_steps_state: int | None = None  # if it is not given, last_n_steps holds for states, too
    last_n_epochs_state: int | None = None
    ending: str = "safetensors"  # --save_model_as
    best: bool = False  # keep the network that validates best
    embedding_apart: bool = False  # an embedding's file beside every network's

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_name(self.name)
        if self.every_n_steps and self.total_steps // self.every_n_steps > _MOST_FILES:
            raise UserError(
                f"--save_every_n_steps {self.every_n_steps}: {self.total_steps // self.every_n_steps} files in "
                f"{self.total_steps} steps; at most {_MOST_FILES}"
            )

    @property
    def epochs(self) -> int:
        """Epochs begun in the whole run."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def last_file(self) -> Path:
        return self.folder / f"{self.name or 'last'}.{self.ending}"

    @property
    def best_file(self) -> Path:
        return self.last_file.with_name(f"{self.last_file.stem}-best.{self.ending}")

    def beside(self, file: Path) -> list[Path]:
        """The further file that goes with a network's: fox-000002.safetensors, fox-000002-embedding.safetensors."""
        return [file.with_name(f"{file.stem}{EMBEDDING_SUFFIX}{file.suffix}")] if self.embedding_apart else []

    def step_file(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}.{self.ending}"

    def epoch_file(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}.{self.ending}"

    def due(self, step: int, *, last: bool = False) -> list[Due]:
        """The files to write once `step` steps are done; `last`: the run ends with this step."""
        files = []
        if self.every_n_steps and step % self.every_n_steps == 0:
            old = self._old_step(step, self.last_n_steps)
            old_state = self._old_step(step, self.last_n_steps_state or self.last_n_steps)
            files.append(self._due(self.step_file(step), (step - 1) // self.steps_per_epoch, old, old_state))
        epoch, rest = divmod(step, self.steps_per_epoch)
        # the last epoch's file would be the same as the final one
        if self.every_n_epochs and rest == 0 and epoch % self.every_n_epochs == 0 and epoch < self.epochs:
            old = self._old_epoch(epoch, self.last_n_epochs)
            old_state = self._old_epoch(epoch, self.last_n_epochs_state or self.last_n_epochs)
            files.append(self._due(self.epoch_file(epoch), epoch, old, old_state))
        if last or step == self.total_steps:
            state = state_folder(self.last_file) if self.states or self.state_at_end else None
            files.append(Due(self.last_file, math.ceil(step / self.steps_per_epoch), state=state))
        return files

    def _due(self, path: Path, epoch: int, old: Path | None, old_state: Path | None) -> Due:
        if not self.states:
            return Due(path, epoch, old)
        remove_state = None if old_state is None else state_folder(old_state)
        return Due(path, epoch, old, state_folder(path), remove_state)

    def left_anything(self) -> bool:
        """Whether a network or a state of this name exists, from any run."""
        file = re.compile(rf"{_named(self.name)}(-best|{_MOMENT})?\.({'|'.join(ENDINGS)})")
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return any(file.fullmatch(name) or is_state_name(name, self.name) for name in names)

    def steps_that_save(self) -> list[int]:
        """The steps after which a file is written."""
        steps = {self.total_steps}
        if self.every_n_steps:
            steps.update(range(self.every_n_steps, self.total_steps, self.every_n_steps))
        if self.every_n_epochs:
            interval = self.every_n_epochs * self.steps_per_epoch
            steps.update(range(interval, self.total_steps, interval))
        return sorted(steps)

    def planned_files(self, *, after_step: int = 0) -> list[Path]:
        """Every network's file that is written after `after_step`, including those that retention later deletes."""
        best = [self.best_file] if self.best else []
        steps = (step for step in self.steps_that_save() if step > after_step)
        return [*best, *(due.path for step in steps for due in self.due(step))]

    def planned_states(self, *, after_step: int = 0) -> list[Path]:
        """As `planned_files`, the folders of states."""
        due = (due for step in self.steps_that_save() if step > after_step for due in self.due(step))
        return [item.state for item in due if item.state is not None]

    def _old_step(self, step: int, last_n: int | None) -> Path | None:
        """The step whose file is deleted. With an interval of 10 and 30 to keep: at step 50 step 10; 20 to 50 stay."""
        if not last_n or not self.every_n_steps:
            return None
        old = step - last_n - 1
        old -= old % self.every_n_steps
        return self.step_file(old) if old > 0 else None

    def _old_epoch(self, epoch: int, last_n: int | None) -> Path | None:
        if not last_n or not self.every_n_epochs:
            return None
        old = epoch - self.every_n_epochs * last_n
        return self.epoch_file(old) if old > 0 else None


def _check_name(name: str) -> None:
    """`UserError` if this cannot be the name of a file."""
    if name in ("", ".", "..") or set("/\\") & set(name):
        raise UserError(f"--output_name: {name!r} is not a plain file name; give folders as --output_dir")
    if not name.isprintable():
        raise UserError(f"--output_name: {name!r} contains a character that no file name should")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UserError(
            f"--output_name: {len(os.fsencode(name))} bytes long; at most {_LONGEST_NAME}, since step numbers and "
            "endings follow"
        )


def state_folder(file: Path) -> Path:
    """Beside a network's file, under kohya's name: fox-000002.safetensors → fox-000002-state."""
    return file.with_name(file.stem + STATE_SUFFIX)


def is_state_name(folder: str, output_name: str | None) -> bool:
    """Whether this is the name of a state of this --output_name: fox-big-state is not one of fox."""
    return re.fullmatch(rf"{_named(output_name)}({_MOMENT})?{STATE_SUFFIX}", folder) is not None


def _named(output_name: str | None) -> str:
    """A pattern for the beginning of the names of a run's files."""
    return re.escape(output_name) if output_name is not None else "(last|at|epoch)"


def epochs_from_ratio(epochs: int, ratio: int) -> int:
    """`save_n_epoch_ratio`: the interval in epochs that gives at least `ratio` files."""
    return epochs // ratio or 1


# -- before training


def check_free(files: Iterable[Path], *, overwrite: bool) -> None:
    """`UserError` if a file that the run will write exists already."""
    existing = [path for path in files if os.path.exists(path)]
    folders = [path for path in existing if path.is_dir()]
    if folders:
        raise UserError(
            f"{folders[0]} is a folder; the run will write a file of that name: choose another --output_name"
        )
    if existing and not overwrite:
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        raise UserError(
            f"the run would replace {', '.join(map(str, existing[:3]))}{more}: "
            "give it another --output_name or --output_dir, or --overwrite to replace them"
        )


def prepare_folder(folder: Path) -> None:
    """Create the output folder and try to write in it; `UserError` if that fails."""
    if not os.path.exists(folder) and folder.parts[:1] and folder.parts[0].startswith("~"):
        raise UserError(f"--output_dir {folder}: cannot be created{nearest_path(folder)}")
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir: cannot write in {folder}: {why_not(error, verb='write to')}") from error


def prepare(files: Collection[Path], *, overwrite: bool) -> None:
    """Both for each of these files: it may be written, and its folder can be written to."""
    check_free(files, overwrite=overwrite)
    for folder in dict.fromkeys(path.parent for path in files):
        prepare_folder(folder)


# -- writing


class BrokenWeightsError(UserError):
    """Weights that are not finite, or would not be in the file's precision: they were not written.

    only_in_file: whether the trained weights are finite, so that a state of them is usable.
    """

    def __init__(self, message: str, *, only_in_file: bool = False) -> None:
        super().__init__(message)
        self.only_in_file = only_in_file


class Savable(Protocol):
    def save(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None: ...


def save_network(network: Savable, path: Path, *, precision: str | None, metadata: Mapping[str, str]) -> None:
    """Write a network's file: beside first, read back and checked, with its hashes, then renamed to `path`.

    The extension of `path` decides the format; only safetensors files have metadata. `precision` is a key of
    PRECISIONS. `BrokenWeightsError` if a tensor holds NaN or infinity, `UserError` if the disk is full or the folder
    cannot be written to; an earlier file at `path` then still exists.
    """
    with replacing(path) as beside:
        network.save(str(beside), PRECISIONS[precision], {**metadata, **UNKNOWN_HASHES})
        check_finite(beside, path.name, precision)
        if beside.suffix == ".safetensors":
            write_hashes(beside)
    logger.info("saved %s", path)


def check_finite(file: Path, name: str, precision: str | None) -> None:
    """`BrokenWeightsError` if a tensor of `file`, which is to be called `name`, holds NaN or infinity."""
    for key, tensor in _tensors(file):
        if not tensor.is_floating_point() or tensor.isfinite().all():
            continue
        advice = "training has diverged: lower the learning rate, or start from an earlier file"
        overflows = precision == "fp16" and not bool(tensor.isnan().any())
        if overflows:
            advice = "values beyond 65504 do not fit into fp16: use --save_precision bf16 or float"
        kind = "NaN" if tensor.isnan().any() else "infinity"
        raise BrokenWeightsError(f"{name}: not written: {key} contains {kind}; {advice}", only_in_file=overflows)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, read as other programs will read it."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                yield key, tensors.get_tensor(key)
    else:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()
