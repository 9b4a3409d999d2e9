"""Files made to harm: refused in a sentence, nothing in them is run, and the memory stays bounded.

All are given to one process of its own, of which the largest size is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import harm
from tests.conftest import PATIENCE, ROOT

LIMIT = 150  # MiB that the whole table may add to the process's largest size


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What came of each file: the exit code, what was printed, and by how many MiB the process had grown by then."""
    folder = tmp_path_factory.mktemp("harm")
    harm.prepare(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_input.harm", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(folder.rglob("executed")) == [], "something in a file was run"
    return json.loads(Path(folder / "results.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("name", harm.TABLE)
def test_harmful_file(name: str, results: dict[str, dict[str, object]]) -> None:
    found = results[name]
    assert found["code"] == 2, found
    assert found["error"] == harm.TABLE[name].message
    grown = found["grown"]
    assert isinstance(grown, float)
    assert grown < LIMIT, f"{grown:.0f} MiB"
