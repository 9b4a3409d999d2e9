"""kohya's scripts under their own paths: what their options say, and with --as_kohya kohya's own numbers."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tools_extract import QUERY, UNET, change, named, of_rank
from tool_files import LINEAR, SHAPES, WIDE, deltas, tensors_of, write

from library.files.header import read_metadata
from networks import (
    check_lora_weights,
    extract_lora_from_models,
    lora_interrogator,
    merge_lora,
    resize_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from networks.tools.__main__ import main as tools
from tests.conftest import BASE, ROOT

DOORS = {
    "merge_lora": merge_lora,
    "sdxl_merge_lora": sdxl_merge_lora,
    "svd_merge_lora": svd_merge_lora,
    "resize_lora": resize_lora,
    "extract_lora_from_models": extract_lora_from_models,
    "check_lora_weights": check_lora_weights,
    "lora_interrogator": lora_interrogator,
}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Of one rank, with different alphas."""
    first = write(tmp_path / "a.safetensors", tensors_of(1, alpha=2.0), {"ss_v2": "False", "modelspec.title": "a"})
    return first, write(tmp_path / "b.safetensors", tensors_of(2, alpha=0.5), {"ss_v2": "False"})


def words(two: tuple[Path, Path], target: Path, *ratios: float) -> list[str]:
    return ["--models", *map(str, two), "--ratios", *map(str, ratios), "--save_to", str(target)]


@pytest.mark.parametrize("name", DOORS)
def test_they_run_as_scripts(name: str) -> None:
    """From another folder, without torch for the help."""
    code = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(ROOT / 'networks' / name)!r} + '.py', "
    code += "run_name='__main__')"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    found = subprocess.run([sys.executable, "-c", check], cwd="/", capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--help" in found.stdout
    assert found.stdout.endswith("False\n")


def test_resizing_from_the_command_line(tmp_path: Path, two: tuple[Path, Path]) -> None:
    ours, target = tmp_path / "ours.safetensors", tmp_path / "c.safetensors"
    given = ["--model", str(two[0]), "--save_to", str(target), "--new_rank", "2", "--new_conv_rank", "1"]
    script = str(ROOT / "networks" / "resize_lora.py")
    found = subprocess.run([sys.executable, script, *given], cwd="/", capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    same = ["resize", str(two[0]), "--rank", "2", "--conv_rank", "1", "--save_precision", "float"]
    assert tools([*same, "--save_to", str(ours)]) == 0
    a, b = load_file(target), load_file(ours)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert resize_lora.main(["--model", str(two[0]), "--save_to", str(target)]) == 2  # it exists


@pytest.mark.parametrize("door", [merge_lora, sdxl_merge_lora])
def test_a_merge_is_what_its_ratios_say(
    tmp_path: Path, two: tuple[Path, Path], door: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --concat exactly, without it the best of the files' rank."""
    main, target = door.main, tmp_path / "c.safetensors"  # type: ignore[attr-defined]
    assert main([*words(two, target, 0.6, -0.4), "--concat"]) == 0
    assert "0.6 acts as 0.36" in capsys.readouterr().err
    a, b = (deltas(load_file(file)) for file in two)
    found = deltas(load_file(target))
    for name in SHAPES:
        assert (found[name] - (0.6 * a[name] - 0.4 * b[name])).norm() < 1e-5 * a[name].norm()
    assert main([*words(two, target, 0.6, -0.4), "--overwrite"]) == 0
    tensors = load_file(target)
    for name, delta in deltas(tensors).items():
        whole = 0.6 * a[name] - 0.4 * b[name]
        assert float((delta - whole).norm()) == pytest.approx(float(torch.linalg.svdvals(whole)[3:].norm()), rel=1e-3)
        assert len(tensors[f"{name}.lora_down.weight"]) == 3


@pytest.mark.parametrize("concat", [False, True])
def test_as_kohya_repeats_its_sum(tmp_path: Path, two: tuple[Path, Path], concat: bool) -> None:
    """down = Σ r √(α / α₀) down and up = Σ |r| √(α / α₀) up; beside each other with --concat; alpha is the first's."""
    target, ratios = tmp_path / "c.safetensors", (0.6, -0.4)
    more = ["--concat"] if concat else []
    assert merge_lora.main([*words(two, target, *ratios), "--as_kohya", *more]) == 0
    found, (a, b) = load_file(target), map(load_file, two)
    root = math.sqrt(0.5 / 2.0)
    for name in SHAPES:
        down = [0.6 * a[f"{name}.lora_down.weight"], -0.4 * root * b[f"{name}.lora_down.weight"]]
        up = [0.6 * a[f"{name}.lora_up.weight"], 0.4 * root * b[f"{name}.lora_up.weight"]]
        expected = (torch.cat(down), torch.cat(up, dim=1)) if concat else (sum(down[1:], down[0]), sum(up[1:], up[0]))
        assert torch.allclose(found[f"{name}.lora_down.weight"], expected[0])
        assert torch.allclose(found[f"{name}.lora_up.weight"], expected[1])
        assert float(found[f"{name}.alpha"]) == 2.0


def test_one_file_as_kohya_acts_as_the_square_of_its_ratio(tmp_path: Path, two: tuple[Path, Path]) -> None:
    target = tmp_path / "c.safetensors"
    given = ["--models", str(two[0]), "--ratios", "0.6", "--save_to", str(target)]
    assert merge_lora.main([*given, "--as_kohya"]) == 0
    a = deltas(load_file(two[0]))
    for name, delta in deltas(load_file(target)).items():
        assert torch.allclose(delta, 0.36 * a[name], atol=1e-5)
    assert merge_lora.main([*given, "--overwrite"]) == 0
    for name, delta in deltas(load_file(target)).items():
        assert torch.allclose(delta, 0.6 * a[name], atol=1e-5)


def test_the_svd_merge_clips_as_kohya_where_asked(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """At the 0.99 quantile of the values of U · σ and Vᵀ."""
    target = tmp_path / "c.safetensors"
    given = [*words(two, target, 0.6, 0.4), "--new_rank", "2", "--new_conv_rank", "3"]
    assert svd_merge_lora.main(given) == 0
    plain = deltas(load_file(target))
    assert svd_merge_lora.main([*given, "--as_kohya", "--overwrite"]) == 0
    tensors, (a, b) = load_file(target), (deltas(load_file(file)) for file in two)
    for name in SHAPES:
        rank = 3 if name == WIDE else 2
        u, values, v = torch.linalg.svd((0.6 * a[name] + 0.4 * b[name]).float(), full_matrices=False)
        up, down = u[:, :rank] * values[:rank], v[:rank]
        assert (plain[name] - up @ down).norm() < 1e-5 * plain[name].norm()
        highest = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
        assert float(tensors[f"{name}.alpha"]) == rank
        for end, expected in (("lora_up", up), ("lora_down", down)):
            found = tensors[f"{name}.{end}.weight"].flatten(1)
            assert torch.allclose(found, expected.clamp(-highest, highest), atol=1e-5), name


def test_extraction_has_kohya_s_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 4, clipped at 0.99, text encoders from a difference of 0.01 on, convolutions left out."""
    tuned = shutil.copytree(BASE, tmp_path / "tuned")
    change(tuned / UNET, {f"{QUERY}.weight": of_rank(4)})
    change(tuned / "text_encoder/model.safetensors", {"encoder.layers.0.mlp.fc1.weight": lambda w: w * 0 + 0.005})
    target, ours = tmp_path / "c.safetensors", tmp_path / "ours.safetensors"
    given = [
        "--model_org",
        str(BASE),
        "--model_tuned",
        str(tuned),
        "--save_to",
        str(target),
        "--load_precision",
        "fp16",
    ]
    assert extract_lora_from_models.main(given) == 0
    said = capsys.readouterr()
    assert "--load_precision has no effect" in said.err
    assert "text encoder: left out" in said.out
    same = ["--rank", "4", "--clamp_quantile", "0.99", "--min_diff", "0.01", "--save_precision", "float"]
    assert tools(["extract", str(BASE), str(tuned), *same, "--save_to", str(ours)]) == 0
    a, b = load_file(target), load_file(ours)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert deltas(a).keys() == {named(QUERY)}


def test_the_check_prints_each_tensor(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_lora_weights.main([str(two[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"number of LoRA modules: {2 * len(SHAPES)}"
    key, shape, mean, least = next(line for line in lines if line.startswith(f"{LINEAR}.lora_up")).split(",")
    values = load_file(two[0])[key].abs()
    assert shape == "(12-3)"
    assert float(mean) == pytest.approx(float(values.mean()))
    assert float(least) == pytest.approx(float(values.min()))
    assert check_lora_weights.main([str(two[0]), "-s"]) == 0
    assert f"number of all modules: {3 * len(SHAPES)}" in capsys.readouterr().out


def test_no_metadata_leaves_out_the_spec(tmp_path: Path, two: tuple[Path, Path]) -> None:
    target = tmp_path / "c.safetensors"
    assert merge_lora.main(words(two, target, 1, 1)) == 0
    assert any(key.startswith("modelspec.") for key in read_metadata(target))
    assert merge_lora.main([*words(two, target, 1, 1), "--no_metadata", "--overwrite"]) == 0
    metadata = read_metadata(target)
    assert metadata["ss_v2"] == "False"
    assert not any(key.startswith("modelspec.") for key in metadata)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("merge_lora", ["--sd_model", "x.safetensors"], "x.safetensors"),
        ("sdxl_merge_lora", ["--lbws", "[1]"], "--lbws: 1 lists for 2 files"),
        ("svd_merge_lora", ["--lbws", "[1]", "[1]", "--as_kohya"], "--lbws with --as_kohya"),
        ("svd_merge_lora", ["--new_rank", "0"], "rank: must be at least 1, not 0"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, two: tuple[Path, Path], name: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert DOORS[name].main([*words(two, tmp_path / "c.safetensors", 1, 1), *more]) == 2
    assert said in capsys.readouterr().err


def test_different_ranks_are_refused_as_kohya(
    tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.safetensors", tensors_of(3, rank=2))
    target = tmp_path / "c.safetensors"
    assert merge_lora.main([*words((two[0], other), target, 1, 1), "--as_kohya"]) == 2
    assert "kohya's sum needs one rank" in capsys.readouterr().err
    assert merge_lora.main(words((two[0], other), target, 1, 1)) == 0
