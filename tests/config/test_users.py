"""Command lines and files as kohya's users have them: each is taken, or refused for exactly the options not supported.

Beside each stands NAME.expected.toml. `refused`: the options that are not supported yet. Where there are none,
`without_effect` lists the options that a warning names, and `values` what some options must be.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import toml

from library.config.options import Options, option_groups
from library.config.parser import parse
from library.errors import UserError

USERS = Path(__file__).parent / "data" / "users"
CASES = sorted(path for path in USERS.iterdir() if not path.name.endswith(".expected.toml"))


def arguments(path: Path) -> list[str]:
    if path.suffix == ".args":
        return shlex.split(path.read_text(encoding="utf-8"), comments=True)
    return ["--config_file", str(path)]


def value(options: Options, name: str) -> Any:
    found = next(
        getattr(getattr(options, group), name) for group in option_groups() if hasattr(getattr(options, group), name)
    )
    return list(found) if isinstance(found, tuple) else found


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_user(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = toml.load(USERS / f"{path.stem}.expected.toml")
    if expected["refused"]:
        with pytest.raises(UserError) as caught:
            parse(arguments(path))
        lines = str(caught.value).splitlines()
        assert [name_in(line) for line in lines] == expected["refused"]
        assert all("not supported here yet" in line for line in lines)
        return
    with caplog.at_level(logging.WARNING):
        options = parse(arguments(path))
    warned = [name_in(record.getMessage()) for record in caplog.records if "has no effect" in record.getMessage()]
    assert warned == expected["without_effect"]
    for name, wanted in expected["values"].items():
        assert value(options, name) == wanted, name


def name_in(message: str) -> str:
    """The option that a message is about: "x.toml: [section] name = 1: …" or "command line: --name: …"."""
    about = message.split(": ")[1].split(" = ")[0]
    return about.split()[-1].removeprefix("--")


def test_there_is_a_dozen() -> None:
    assert len(CASES) >= 12
