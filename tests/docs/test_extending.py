"""The recipes of docs/extending.md, executed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from library.run import build
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def block(word: str) -> str:
    (found,) = (text for text in BLOCKS if word in text)
    return found


def test_the_adapter_is_the_one_that_is_tested() -> None:
    """tests/networks/test_new_kind.py trains it, saves, resumes, merges and converts it."""
    file = (ROOT / "tests" / "networks" / "made_up" / "diagonal.py").read_text(encoding="utf-8")
    assert file.endswith(block("class Diagonal"))


def test_the_hook_ends_the_run_and_resumes(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, type] = {}
    exec(compile(block("class GoodEnough"), "docs/extending.md", "exec"), names)
    made = []

    def with_hook(*given: object) -> object:
        hook = names["GoodEnough"](limit=10.0, steps=3)
        made.append(hook)
        return (*make_hooks(*given), hook)

    make_hooks = build.make_hooks
    monkeypatch.setattr(build, "make_hooks", with_hook)
    assert train("--max_train_steps", "2", "--save_state_on_train_end") == 0
    (state,) = tmp_path.rglob("*-state")
    assert made[-1].state_dict() == {"low": 2}
    assert train("--max_train_steps", "9", "--resume", str(state), "--resume_anyway", "--overwrite") == 0
    assert made[-1].state_dict() == {"low": 3}  # it ended after its third low step, one after the resume


def test_the_table_names_what_is_there() -> None:
    for path, name in (
        ("networks/kinds.py", "KINDS"),
        ("library/models/__init__.py", "FAMILIES"),
        ("library/optimizers/registry.py", "OPTIMIZERS"),
        ("library/run/hooks.py", "_hooks"),
    ):
        assert f"`{name}` (`{path}`)" in PAGE
        assert re.search(rf"^(def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name
