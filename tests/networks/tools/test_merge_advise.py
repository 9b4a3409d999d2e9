"""`merge --advise`: the three numbers against dense matrices, and each rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tool_files import LINEAR, SHAPES, deltas, tensors_of, write
from torch import Tensor

from networks.tools import result
from networks.tools.__main__ import main
from networks.tools.advise import DENSITY, pairs_of

BIG = {LINEAR: (64, 48), "lora_unet_mid_block_attentions_0_proj_in": (48, 64, 1, 1)}


def _files(folder: Path, *tensors: dict[str, Tensor]) -> list[Path]:
    return [write(folder / f"{name}.safetensors", own) for name, own in zip("abc", tensors, strict=False)]


def _scaled(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {key: one * factor if "lora_up" in key else one for key, one in tensors.items()}


def test_the_numbers_are_those_of_the_dense_differences(tmp_path: Path) -> None:
    a, b = tensors_of(1), tensors_of(2, rank=2)
    sources = result.read(_files(tmp_path, a, b), purpose="is compared")
    (pair,) = pairs_of(["a", "b"], [result.factors(one) for one in sources])
    assert pair.layers.keys() == SHAPES.keys()
    for name, found in pair.layers.items():
        one, two = deltas(a)[name].flatten(), deltas(b)[name].flatten()
        assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(one, two, dim=0)), abs=1e-5)
        assert found.ratio == pytest.approx(float(one.norm() / two.norm()), rel=1e-5)
        count = round(DENSITY * len(one))
        large = [set(vector.abs().argsort(descending=True)[:count].tolist()) for vector in (one, two)]
        both = sorted(large[0] & large[1])
        opposite = [place for place in both if one[place] * two[place] < 0]
        assert (found.both, found.opposite) == (len(both), len(opposite))


@pytest.mark.parametrize(
    ("second", "weights", "said"),
    [
        (tensors_of(2, names=BIG), ["1", "1"], ["--method linear: the files hardly overlap"]),
        (tensors_of(1, names=BIG), ["1", "1"], ["--method slerp: a.safetensors and b.safetensors point the same way"]),
        (tensors_of(1, names=BIG), ["1", "-1"], ["--method ties", "cosine -1.00", "conflicts 100 %"]),
        (_scaled(tensors_of(2, names=BIG), 8), ["1", "1"], ["b.safetensors changes the model", "times as much as a."]),
        (
            tensors_of(2, names={"lora_unet_x": (8, 8)}),
            ["1", "1"],
            ["--method linear: the files have no layer in common"],
        ),
    ],
)
def test_each_rule(second: dict[str, Tensor], weights: list[str], said: list[str], tmp_path: Path, capsys) -> None:
    files = _files(tmp_path, tensors_of(1, names=BIG), second)
    plot = tmp_path / "plot.png"
    assert main(["merge", *map(str, files), "--weights", *weights, "--advise", str(plot)]) == 0
    found = capsys.readouterr().out
    assert all(words in found for words in said), found
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "plot.png"]


def test_three_files_that_are_alike_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = _files(tmp_path, *[tensors_of(1)] * 3)
    assert main(["merge", *map(str, files), "--advise", str(tmp_path / "plot.png")]) == 0
    found = capsys.readouterr().out
    assert found.count("layers in both") == 3
    assert "give weights that add up to 1" in found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--advise", "PLOT.png", "--rank", "4"], "--rank has no effect with --advise"),
        (["--advise", "PLOT.png", "--save_to", "x.safetensors"], "--save_to has no effect with --advise"),
        (["--advise", "PLOT.jpg"], "has to end with .png"),
        ([], "--save_to: the file to write is missing"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = _files(tmp_path, tensors_of(1), tensors_of(2))
    own = [word.replace("PLOT", str(tmp_path / "plot")) for word in words]
    assert main(["merge", *map(str, files), *own]) == 2
    assert said in capsys.readouterr().err
