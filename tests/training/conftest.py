"""The tiny model of a family, and runs with it, for tests that have a parameter `family`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.flow_families import FlowFamily


@pytest.fixture
def model(family: FlowFamily, request: pytest.FixtureRequest) -> Path:
    """The folder of the family's tiny model."""
    folder: Path = request.getfixturevalue(family.fixture)
    return folder


@pytest.fixture
def train_family(family: FlowFamily, model: Path, train: Callable[..., int]) -> Callable[..., int]:
    """As `train`, with this model and short texts."""
    return partial(train, "--pretrained_model_name_or_path", str(model), *family.short())
