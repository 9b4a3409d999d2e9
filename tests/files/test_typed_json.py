"""Dataclasses to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from library.files.typed_json import from_json, to_json


@dataclass(frozen=True)
class Leg:
    length: float


@dataclass(frozen=True)
class Fox:
    name: str
    legs: tuple[Leg, ...]
    size: tuple[int, int]
    den: Leg | None = None
    tags: dict[str, int] = field(default_factory=dict)
    other: list[Any] = field(default_factory=list)
    wild: bool = True
    free: object = None


REYNARD = Fox(
    "Reynard", (Leg(0.1), Leg(2.0)), (3, 4), Leg(1.5), {"red": 1}, [None, "x", [1]], wild=False, free={"a": [1]}
)


def test_there_and_back():
    assert from_json(Fox, json.loads(json.dumps(to_json(REYNARD)))) == REYNARD
    short = Fox("Reynard", (), (3, 4))
    assert from_json(Fox, json.loads(json.dumps(to_json(short)))) == short


def test_what_json_cannot_hold():
    assert to_json({1: (math.nan, math.inf, 1e-300, True), "path": Path("a/b")}) == {
        "1": [None, None, 1e-300, True],
        "path": "a/b",
    }


def test_whole_numbers_may_be_floats_and_new_keys_do_no_harm():
    table = {"name": "R", "legs": [{"length": 2, "bent": True}], "size": [1, 2], "colour": "red"}
    assert from_json(Fox, table) == Fox("R", (Leg(2.0),), (1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "Fox name: int where str is expected"),
        ({"wild": 1}, "Fox wild: int where bool is expected"),
        ({"size": [1]}, "Fox size: 1 values, not 2"),
        ({"size": [1, True]}, "Fox size 1: bool where int is expected"),
        ({"legs": [{}]}, "Fox legs 0: length is missing"),
        ({"den": []}, "Fox den: list where dict is expected"),
        ({"tags": {"red": "x"}}, "Fox tags red: str where int is expected"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Fox, to_json(REYNARD) | change)
    with pytest.raises(ValueError, match="Fox: list where dict is expected"):
        from_json(Fox, [])
