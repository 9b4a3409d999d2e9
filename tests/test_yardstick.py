"""The program does what it did: the cases of `tests.yardstick`, file by file and message by message; in `make test`
those that are fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.quick import quick
from tests.yardstick.cases import CASES, Case
from tests.yardstick.measure import Yardstick
from tests.yardstick.runner import lacks


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yardstick]:
    with Yardstick(tmp_path_factory.mktemp("yardstick") / "work") as one:
        yield one


@pytest.mark.parametrize(
    "case",
    quick(CASES.values(), *(case for case in CASES.values() if case.fast)),
    ids=lambda case: case.name,
)
def test_the_program_does_what_it_did(case: Case, yardstick: Yardstick) -> None:
    if reason := lacks(case):
        pytest.skip(f"needs {reason}")
    lines = yardstick.differences(case, yardstick.measure(case))
    assert not lines, "\n".join(
        [*lines, "", "wanted? python -m tests.yardstick record, and a line in tests/yardstick/CHANGES.md"]
    )
