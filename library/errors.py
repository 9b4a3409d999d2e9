"""Errors that the user can correct, and hints for their messages."""

from __future__ import annotations

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """A value from the user cannot be used: the message names the place, the value and the nearest right one.

    The command line prints it without a traceback and ends with exit code 2. Faults of the program itself are
    `AssertionError` or whatever Python raises, and keep their traceback.
    """


class CommonError(UserError):
    """An error that all processes of a run raise at the same point: the first prints it, no other waits for it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest of `known`, or an empty string if none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f", did you mean '{lowered[near[0]]}'?" if near else ""


def nearest_path(path: Path) -> str:
    """A hint for a path that cannot be used: the obstacle, or the nearest name to its first missing part."""
    if path.parts[:1] and path.parts[0].startswith("~"):
        return f"; '{path.parts[0]}' is not replaced by a home folder here: write it in full"
    if path.name.endswith('"'):
        return "; it ends with a quote: on Windows, a backslash before the closing quote escapes it"
    hindrance = _hindrance(path)
    if hindrance:
        return f"; {hindrance}"
    wrong = path
    while not os.path.exists(wrong.parent) and wrong.parent != wrong:
        wrong = wrong.parent
    try:
        names = {unicodedata.normalize("NFC", entry.name): entry.name for entry in wrong.parent.iterdir()}
    except OSError:
        return ""
    near = difflib.get_close_matches(unicodedata.normalize("NFC", wrong.name), names, n=1, cutoff=0.5)
    if near:
        name = names[near[0]]
        alike = " It differs only in how accents are stored: copy it from there." * look_alike(name, wrong.name)
        return f", did you mean '{wrong.parent / name}'?{alike}"
    return f"; there is no '{wrong}'" if wrong != path else ""


def look_alike(*names: str) -> bool:
    """Whether different names differ only in their form of Unicode: "é" in one piece, or "e" and an accent."""
    return len({unicodedata.normalize("NFC", name) for name in names}) < len(set(names))


def told_apart(names: Sequence[str]) -> list[str]:
    """The names for a message, with the codes of their characters if some look alike."""
    return [ascii(name) for name in names] if look_alike(*names) else list(names)


def is_utf8(text: str) -> bool:
    """Whether text from the system can be written again: file names and words may hold bytes of other encodings."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_REASONS = {
    errno.EACCES: "there is no right to {verb} it",
    errno.EPERM: "there is no right to {verb} it",
    errno.EEXIST: "it is a file",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of this path is a file",
    errno.ELOOP: "it is a link that leads back to itself",
    errno.ENAMETOOLONG: "the name is longer than the file system takes",
    errno.ENOENT: "no such file (a broken link?)",
}


def why_not(error: OSError | ValueError, *, verb: str = "read") -> str:
    """The system's error about a path that cannot be read, or written, in plain words."""
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0, error.strerror or str(error)).format(verb=verb)
    return "a path cannot hold a null character"


def _hindrance(path: Path) -> str:
    """Why an existing path cannot be used; empty for one that does not exist."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except PermissionError:
        closed = next((folder for folder in path.parents if not os.access(folder, os.X_OK)), path.parent)
        return f"there is no right to look into '{closed}'"
    except (OSError, ValueError) as error:
        return why_not(error)
    kinds = ("folder" * os.path.isdir(path), "file" * os.path.isfile(path))
    return f"it is a {''.join(kinds)}" if any(kinds) else "it is neither a file nor a folder"
