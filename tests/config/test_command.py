"""The command line of a tool: options of dataclasses, and words without an option's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from library.config.command import Command, Read, Word, read
from library.config.fields import REQUIRED, option
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The cut"""

    rank: int = option(REQUIRED, minimum=1, help="the new rank")
    method: Literal["exact", "random"] | None = option(None, help="how")
    weights: tuple[float, ...] = option((), help="one for each")
    keep: bool = option(True, help="keep the old one")
    verbose: bool = option(False, aliases=("v",), help="print more")
    save_to: Path | None = option(None, help="where to")


ONE = Command(name="cut", description="Cuts.", groups={"cut": Cut}, words=(Word("FILE", "the file"),))
MANY = Command(name="cut", description="Cuts.", groups={"cut": Cut}, words=(Word("FILE", "the files", many=True),))
TWO = Command(name="cut", description="Cuts.", groups={"cut": Cut}, words=(Word("OLD", "one"), Word("NEW", "another")))
NONE = Command(name="cut", description="Cuts.", groups={"cut": Cut})


def cut(command: Command, line: str) -> tuple[Cut, tuple[str, ...]]:
    found: Read = read(command, line.split())
    return found.groups["cut"], found.words


def refused(command: Command, line: str) -> list[str]:
    with pytest.raises(UserError) as error:
        cut(command, line)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    "line",
    ["a.st --rank 4 --verbose", "--rank 4 a.st --verbose", "--verbose a.st --rank 4", "--rank=4 -v a.st"],
)
def test_words_stand_before_or_behind_options_that_do_not_take_them(line: str) -> None:
    assert cut(ONE, line) == (Cut(rank=4, verbose=True), ("a.st",))


def test_words_keep_their_order() -> None:
    assert cut(TWO, "old --rank 4 new")[1] == ("old", "new")
    assert cut(MANY, "a b --rank 4 c --verbose d e --weights 1 -2.5")[1] == ("a", "b", "c", "d", "e")


def test_a_flag_takes_a_truth_and_no_other_word() -> None:
    assert cut(ONE, "--rank 1 --verbose true a") == (Cut(rank=1, verbose=True), ("a",))
    assert cut(ONE, "--rank 1 --no-keep a") == (Cut(rank=1, keep=False), ("a",))


def test_values_become_their_types() -> None:
    found, _ = cut(MANY, "a --rank 4 --save_to b/c.st --weights 1 2 --weights 3")
    assert found.save_to == Path("b/c.st")
    assert found.weights == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        (ONE, "a --rnak 4", ["command line: --rnak: unknown option, did you mean 'rank'?"]),
        (ONE, "--rank 4", ["FILE is required, before the options: the file"]),
        (TWO, "old --rank 4", ["NEW is required, before the options: another"]),
        (ONE, "a b --rank 4", ["command line: unexpected word 'b': options begin with --"]),
        (NONE, "--rank 4 b", ["command line: --rank: takes one value, not 2: '4', 'b'"]),
        (NONE, "b --rank 4", ["command line: unexpected word 'b': options begin with --"]),
        (MANY, "a", ["--rank is required: the new rank"]),
        (MANY, "a —rank 4", ["command line: '—rank': options begin with two hyphens: --rank"]),
        (
            MANY,
            "--rank 4 --weights 1 a.st",
            [
                "command line: --weights: 'a.st' is not a number; FILE stands before the options",
                "FILE is required, before the options: the files",
            ],
        ),
        (
            ONE,
            "a --rank 0 --method exakt --wat",
            [
                "command line: --rank: must be at least 1, not 0",
                "command line: --method: 'exakt' is not one of exact, random, did you mean 'exact'?",
                "command line: --wat: unknown option",
            ],
        ),
    ],
)
def test_every_mistake_is_named(command: Command, line: str, expected: list[str]) -> None:
    assert refused(command, line) == expected


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(UserError, match="an empty word"):
        read(ONE, ["", "--rank", "4"])


def test_help_names_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read(MANY, ["--help", "--rank", "no number"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: cut FILE [...] [--option value ...]" in shown
    assert "--no-keep" in shown
