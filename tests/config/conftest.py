"""Shared by the tests of the options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.options import Options
from library.config.parser import parse

# What every run needs
REQUIRED = ["--pretrained_model_name_or_path", "base.safetensors", "--output_dir", "out"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one, so that messages name files without their folders."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options() -> Callable[..., Options]:
    """`options("--resolution", "512")`: the options for these words and what every run needs."""
    return lambda *words: parse([*REQUIRED, *words])
