"""Adapter files of each family that is trained by flow matching act as trained, in both namings. Their names, and what
other programs make of them, are in test_NAME_files.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_models import FLOW_BOUND, check_conversion, check_reading, flow_family, flow_outputs, trained

from tests.flow_families import FLOW, ROWS


@pytest.fixture(scope="module", params=ROWS, ids=str)
def family(request: pytest.FixtureRequest) -> Any:
    return flow_family(request.param.name, request.getfixturevalue(request.param.fixture))


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_file_is_read_as_it_acts(family: Any, tmp_path: Path, naming: str) -> None:
    content = check_reading(family, flow_outputs, tmp_path / "adapter.safetensors", naming, bound=FLOW_BOUND)
    row = FLOW[family.NAME]
    assert content.naming == ("kohya" if naming == "kohya" else row.other_naming)
    if row.other_naming == "ComfyUI":  # where no layers are fused in files
        assert len(content.layers) == sum(row.layers.values())


def test_conversion_goes_both_ways(family: Any, tmp_path: Path) -> None:
    """Where kohya's layers are fused, to single ones and back."""
    trained(family, flow_outputs, tmp_path / "kohya.safetensors", "kohya")
    check_conversion(tmp_path)
