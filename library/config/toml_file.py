"""Reading and writing TOML files, with errors that name the file, the line and what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import toml

from library.errors import UserError, nearest_path, why_not


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark (Windows' editors write one). Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a text file in UTF-8: its byte {error.start} is not; save it again as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {why_not(error)}") from None


def read_toml(path: Path) -> dict[str, object]:
    """The content of a TOML file. Raises UserError."""
    text = read_text(path)
    try:
        content = toml.loads(text)
    except toml.TomlDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
        raise UserError(f"{path}, line {error.lineno}: {_shown(line)}: {_explain(line, error.msg)}") from None
    except RecursionError:
        raise UserError(f"{path}: its lists or tables are nested too deeply") from None
    except (IndexError, KeyError, TypeError, AttributeError):
        # The toml package trips over some unfinished files instead of reporting them,
        _refuse_open_brackets(path, text)
        raise UserError(f"{path}: not valid TOML: a list, a string or a table is not finished") from None
    _refuse_open_brackets(path, text)  # and reads others without complaint, losing values
    return content


_LONGEST_SHOWN = 100  # characters of a line in a message

_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' r"'''.*?'''|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL
)


def _refuse_open_brackets(path: Path, text: str) -> None:
    """Raise UserError for a bracket that is opened and never closed."""
    bare = _STRING_OR_COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    opened: list[tuple[str, int]] = []
    for number, line in enumerate(bare.splitlines(), 1):
        for character in line:
            if character in "[{":
                opened.append((character, number))
            elif character in "]}" and opened:
                opened.pop()
    if opened:
        bracket, number = opened[0]
        raise UserError(f"{path}, line {number}: {_shown(text.splitlines()[number - 1])}: {bracket} is never closed")


def _shown(line: str) -> str:
    """The line in quotes, or its beginning."""
    line = line.strip()
    return repr(line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]}…")


def _explain(line: str, message: str) -> str:
    """The mistake in `line`, in plainer words than the toml package's for the commonest ones."""
    text = line.partition("=")[2].strip()
    if "escape" in message.lower():
        return "write paths with / or in single quotes: in double quotes \\ is an escape character"
    if re.search(r'[^\\]\\"\s*(?:#.*)?$', text):
        return "a backslash before the closing quote makes it a letter: write paths with / or in single quotes"
    if "lowercase booleans" in message:
        return "write true and false in lower case"
    if line.startswith("{"):
        return "this is JSON, and TOML is expected: seed = 1"
    if ":" in message and re.match(r"[\w-]+\s*:", line):
        return f"between name and value stands =, not a colon: {line.replace(':', ' =', 1)}"
    if text[:1] in ("“", "”", "‘", "’", "„", "«"):
        return "text needs straight quotes: ' or \""
    if "Exceeds the limit" in message:
        return "the number has thousands of digits"
    if re.match(r"[A-Za-z./~\\]", text):
        return f"text needs quotes: {line.partition('=')[0].strip()} = {text.split(' #')[0].strip()!r}"
    if "homogeneous" in message:
        return "the items of a list must be of one kind: 0.0 beside 1e-4, not 0"
    if "already exists" in message:
        return "the section stands twice in this file"
    if message == "Duplicate keys!":
        return "the key stands twice in this section"
    if message.startswith("invalid literal for int"):
        return "the value is neither text in quotes, nor a number, true or false, nor a list"
    return message.strip()


def toml_text(values: Mapping[str, object]) -> str:
    """`values` in TOML. Text is written as JSON has it: the toml package alters what has a backslash before an x."""
    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = partial(json.dumps, ensure_ascii=False)
    return toml.dumps(values, encoder=encoder)


def write_toml(path: Path, values: Mapping[str, object]) -> None:
    """Write `values` as a flat TOML file. Raises UserError if it cannot be written."""
    try:
        path.write_text(toml_text(values), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
