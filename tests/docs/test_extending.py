"""The recipes of docs/extending.md, executed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.quality import check
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


def test_the_check_finds_panoramas(
    train: Callable[..., int], image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(compile(block("panorama"), "docs/extending.md", "exec"), names)
    monkeypatch.setattr(check, "CHECKS", (*check.CHECKS, names["check"]))
    Image.effect_noise((200, 64), 90).save(image_folder / "2_style" / "wide.png")
    assert train("--check_data") == 0
    said = capsys.readouterr().out
    assert "to know     panorama: 1 of 7 images are more than 3 times as long as wide" in said
    assert "wide.png (200 × 64)" in said


def test_the_table_names_what_is_there() -> None:
    for path, name in (
        ("networks/kinds.py", "KINDS"),
        ("library/models/__init__.py", "FAMILIES"),
        ("library/optimizers/registry.py", "OPTIMIZERS"),
        ("library/run/hooks.py", "_hooks"),
        ("library/data/quality/check.py", "CHECKS"),
    ):
        assert f"`{name}` (`{path}`)" in PAGE
        assert re.search(rf"^(def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name
