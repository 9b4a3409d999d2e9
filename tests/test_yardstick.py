"""The program does what it did: the fast cases of `tests.yardstick`, file by file and message by message."""

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


FAST = [case for case in CASES.values() if case.fast]
LONGER = {  # seconds each
    *("started_from_files", "disk_caches", "samples", "buckets", "from_file", "adafactor", "adamw_8_bits"),
    *("sdxl_blocks", "sdxl_float8", "schedule_free", "rolled_back", "dry_run", "lokr", "ranks_and_rates", "sdxl_bf16"),
    *("any_class", "preservation", "other_vae", "several_folders", "objective_l1", "masks", "objective_random"),
    *("sd2_v", "sdxl_command", "alpha_masks", "metadata_file"),
}


@pytest.mark.parametrize(
    "case", quick(FAST, *(case for case in FAST if case.name not in LONGER)), ids=lambda case: case.name
)
def test_the_program_does_what_it_did(case: Case, yardstick: Yardstick) -> None:
    if reason := lacks(case):
        pytest.skip(f"needs {reason}")
    lines = yardstick.differences(case, yardstick.measure(case))
    assert not lines, "\n".join(
        [*lines, "", "wanted? python -m tests.yardstick record, and a line in tests/yardstick/CHANGES.md"]
    )
