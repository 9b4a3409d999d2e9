"""The errors that benchmarks/tools.py prints, and the names of its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import tools
from networks.tools.low_rank import truncated

LAYERS = [("lora_unet_a", (24, 16)), ("lora_unet_b", (8, 6, 3, 3))]


def test_the_best_error_is_that_of_the_truncation(tmp_path: Path) -> None:
    tools.write_lora(tmp_path / "a.safetensors", LAYERS, 8, 0, "sd_v1")
    exact = tools.factors_in(tmp_path / "a.safetensors")
    whole = sum(float(one.dense().double().square().sum()) for one in exact.values())
    lost = sum(float(torch.linalg.svdvals(one.dense().double())[3:].square().sum()) for one in exact.values())
    assert sum(tools.lost(one, 3) for one in exact.values()) == pytest.approx(lost, rel=1e-5)
    found = {name: truncated(one, 3) for name, one in exact.items()}
    assert tools.distance(found, exact) == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert tools.distance(exact, exact) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_its_checkpoints_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    """Every layer that a LoRA of the family sits on has its weight, in the right shape."""
    from library.models.opening import open_family

    path = tmp_path / f"{family}.safetensors"
    tools.write_checkpoint(path, family, empty=True)
    opened = open_family(str(path))
    found = opened.NAME
    assert found == {"sd15": "sd", "sdxl": "sdxl"}[family]
    with opened.outlined():
        assert opened.adapter_targets()
