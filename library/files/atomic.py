"""Writes files and folders atomically: whole or not at all, even if the program is killed or the disk is full.

A file is written beside its place under the hidden name `.NAME.part` and renamed when it is complete; a folder that is
replaced exists for a moment as `.NAME.old`, and one that is removed as `.NAME.gone`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from library.errors import UserError

logger = logging.getLogger(__name__)

_OLD = ".old"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; moved to `path` when the block ends, removed if the block fails.

    After the move `path` is on the disk, whatever happens to the machine. OS errors are raised as `UserError`.
    """
    # keeps the extension, by which network modules choose the format; no random part: the next run replaces a leftover
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with _user_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(b"")
            mode = beside.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
            yield beside
            beside.chmod(mode)
            _sync(beside)
            os.replace(beside, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a folder of files: it appears whole or not at all. An older one at `path` is removed last.

    A full folder cannot be replaced in one move: after a kill between the two, `bring_back` returns the older one.
    """
    beside, old = path.with_name(f".{path.name}.part"), _old(path)
    try:
        with _user_errors(path):
            bring_back(path)
            shutil.rmtree(beside, ignore_errors=True)
            _remove_folder(old)
            beside.mkdir(parents=True)
            yield beside
            for inside in (*beside.rglob("*"), beside):
                (_sync_folder if inside.is_dir() else _sync)(inside)
            if path.exists():
                os.replace(path, old)
            os.replace(beside, path)
            _sync_folder(path.parent)
    finally:
        bring_back(path)
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            _remove_folder(old)


def bring_back(path: Path) -> None:
    """Undo a `replacing_folder` that ended between its two moves: the older folder is at `path` again."""
    if not os.path.lexists(path):
        with contextlib.suppress(OSError):  # mostly there is none
            os.replace(_old(path), path)


def half_replaced(folder: Path) -> list[Path]:
    """The folders in `folder` that `bring_back` can restore."""
    return [path.with_name(path.name[1 : -len(_OLD)]) for path in folder.glob(f".*{_OLD}")]


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists; a folder disappears in one move."""
    try:
        _remove_folder(_old(path))  # or `bring_back` would restore it
        there = path.is_file() or path.is_symlink()
        if there:
            path.unlink()
        else:
            there = _remove_folder(path)
    except OSError as error:  # on Windows: another program has it open
        logger.warning("%s is no longer needed but cannot be removed: %s", path, error.strerror)
        return
    if there:
        logger.info("removed %s", path)


def _remove_folder(path: Path) -> bool:
    """Returns whether it was there. It is renamed first, so that a kill leaves no half of it at its place."""
    going = path.with_name(f".{path.name.removeprefix('.')}.gone")
    shutil.rmtree(going, ignore_errors=True)  # left by a removal that was killed
    if not path.is_dir():
        return False
    os.replace(path, going)
    shutil.rmtree(going, ignore_errors=True)
    return True


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD}")


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some network file systems cannot; the file is there all the same
            _sync(path)


@contextlib.contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Raise the system's errors while `path` is written as `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not written: {_reason(error)}") from error
    except RuntimeError as error:
        # torch.save does not pass on the system's error, only the place where its own writer noticed it
        if not any(mark in str(error) for mark in ("PytorchStreamWriter", "inline_container", "iostream")):
            raise
        raise UserError(f"{path}: not written: the disk is full, or the file is too large for it") from error


def _reason(error: OSError | SafetensorError) -> str:
    """safetensors passes on the system's message, not its number."""
    name = errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None
    if name in ("ENOSPC", "EDQUOT") or "No space left" in str(error) or "os error 112" in str(error):  # 112: Windows
        return "the disk is full. Free some space, or choose an --output_dir elsewhere"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
