"""Every kind of adapter in two processes: the weights that one process trains on the same global batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_two_processes import IMAGES, launch, words

from networks.kinds import KINDS

pytestmark = pytest.mark.slow
RANK, BLOCKS = ("--network_dim", "4"), ("--network_dim", "6")
SIZES = dict.fromkeys(("full", "ia3", "norm"), ()) | {"oft": RANK, "vera": RANK, "boft": BLOCKS}
STEPS = ("--max_train_steps", "4", "--network_train_unet_only")


def command(folder: Path, kind: str, *more: str) -> list[str]:
    usual = words(folder, kind, *STEPS, "--network_module", f"networks.{kind}", *more)
    sizes = usual.index("--network_dim")
    given = SIZES.get(kind, ("--network_dim", "4", "--network_alpha", "2"))
    return [*usual[:sizes], *given, *usual[sizes + 4 :]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "data" / "2_style").mkdir(parents=True)
    for image in sorted(IMAGES.glob("*.png"))[:5]:
        shutil.copy(image, folder / "data" / "2_style")
        shutil.copy(image.with_suffix(".txt"), folder / "data" / "2_style")
    return launch(folder, {kind: command(folder, kind) for kind in KINDS})


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind: str, runs: Any, tmp_path: Path) -> None:
    """The gradients are summed in another order, which Adam carries on for 4 steps."""
    from train_network import main

    assert [run["code"] for run in runs(kind)] == [0, 0]
    assert [run["world"] for run in runs(kind)] == [[2], [2]]
    shutil.copytree(runs.folder / "data", tmp_path / "data")
    assert main(command(tmp_path, kind, "--gradient_accumulation_steps", "2")) == 0
    one, two = (load_file(folder / "out" / f"{kind}.safetensors") for folder in (tmp_path, runs.folder))
    assert one.keys() == two.keys()
    apart = torch.cat([(one[key] - two[key]).double().flatten() for key in one]).square().mean().sqrt()
    # Adam moves a number by about the rate in each step. A sum of two is the same in either order: 0 was seen
    assert apart < 0.02 * 4 * 1e-3, apart
