"""JSON that users write or programs leave behind, with errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from library.errors import UserError, is_utf8

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

Config: TypeAlias = Mapping[str, Any]
"""A configuration of diffusers or transformers, as its JSON has it: values are checked where they are read."""


def parse_json(text: str, place: str, *, first_line: int = 1) -> Json:
    """The parsed text, which begins in line `first_line` of `place`. Raises UserError if it is no JSON."""
    try:
        content: Json = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ": write paths with /, or each \\ twice" if "escape" in error.msg else ""
        raise UserError(f"{place}, line {first_line + error.lineno - 1}: not valid JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{place}: its lists or tables are nested too deeply") from None
    except ValueError:  # Python's limit on the length of whole numbers
        raise UserError(f"{place}: contains a number with thousands of digits") from None
    if "\\ud" in text.lower() and not is_utf8(json.dumps(content, ensure_ascii=False)):
        raise UserError(f"{place}: contains half a character, such as \\ud83d without its other half")
    return content
