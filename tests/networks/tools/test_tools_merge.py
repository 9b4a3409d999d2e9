"""Merging and resizing LoRA files, against dense matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tool_files import LINEAR, SHAPES, TEXT, WIDE, deltas, tensors_of, write

from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from networks.tools.__main__ import main
from networks.tools.low_rank import Factors, factors_of, truncated
from networks.tools.resize import count_of


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within fp32's rounding of sums of a few terms."""
    return bool((actual - expected).norm() <= 1e-5 * max(float(expected.norm()), 1.0))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = write(tmp_path / "a.safetensors", tensors_of(1))
    names = {name: SHAPES[name] for name in (LINEAR, WIDE)}
    return first, write(tmp_path / "b.safetensors", tensors_of(2, rank=2, alpha=None, names=names))


def test_a_merge_is_the_weighted_sum(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """Of files with different ranks, alphas and layers, with a negative weight: exact, and ranks add up."""
    target = tmp_path / "sum.safetensors"
    assert main(["merge", *map(str, two), "--weights", "0.6", "-1.5", "--save_to", str(target)]) == 0
    found, (a, b) = load_file(target), (deltas(load_file(file)) for file in two)
    for name, delta in deltas(found).items():
        assert _close(delta, 0.6 * a[name] + (-1.5 * b[name] if name in b else 0)), name
    assert deltas(found).keys() == a.keys()
    assert len(found[f"{LINEAR}.lora_down.weight"]) == 5
    assert len(found[f"{TEXT}.lora_down.weight"]) == 3
    assert found[f"{WIDE}.lora_down.weight"].shape == (5, 6, 3, 3)


def test_a_merge_to_a_rank_is_the_best_of_that_rank(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """Its error is that of the singular values that are cut off (Eckart, Young 1936)."""
    target = tmp_path / "sum.safetensors"
    assert main(["merge", *map(str, two), "--rank", "2", "--conv_rank", "1", "--save_to", str(target)]) == 0
    found, (a, b) = deltas(load_file(target)), (deltas(load_file(file)) for file in two)
    for name, delta in found.items():
        whole = a[name] + b.get(name, 0)
        rest = torch.linalg.svdvals(whole)[1 if name == WIDE else 2 :]
        assert float((delta - whole).norm()) == pytest.approx(float(rest.norm()), rel=1e-4, abs=1e-4)


def test_the_result_states_its_sources(tmp_path: Path, two: tuple[Path, Path]) -> None:
    target = tmp_path / "sum.safetensors"
    assert main(["merge", *map(str, two), "--weights", "0.6", "0.4", "--save_to", str(target)]) == 0
    metadata = read_metadata(target)
    rows = json.loads(metadata["ss_made_from"])
    assert [(row["name"], row["weight"]) for row in rows] == [("a.safetensors", 0.6), ("b.safetensors", 0.4)]
    assert rows[0]["sshs_model_hash"] == safetensors_hashes(two[0])["sshs_model_hash"]
    assert metadata["sshs_model_hash"] == safetensors_hashes(target)["sshs_model_hash"]
    assert (metadata["ss_network_dim"], metadata["ss_base_model_version"]) == ("Dynamic", "sd_v1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "1"], "--weights: 1 for 2 files"),
        (["--weights", "1", "nan"], "--weights: 'nan' is not a number"),
        (["--weights", "0", "0"], "every weight is 0"),
        (["--rank", "0"], "--rank: must be at least 1, not 0"),
        (["--conv_rank", "2"], "--conv_rank has no effect without --rank"),
        (["--weights", "1e5", "1", "--save_precision", "fp16"], "which float16 does not hold"),
    ],
)
def test_wrong_options_of_merge(
    tmp_path: Path, two: tuple[Path, Path], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "sum.safetensors"
    assert main(["merge", *map(str, two), *words, "--save_to", str(target)]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


def test_sources_and_results_are_not_replaced(
    tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = two[0].read_bytes()
    assert main(["merge", *map(str, two), "--save_to", str(two[0]), "--overwrite"]) == 2
    assert "is one of the sources" in capsys.readouterr().err
    other = write(tmp_path / "there.safetensors", tensors_of(3))
    assert main(["merge", *map(str, two), "--save_to", str(other)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", *map(str, two), "--save_to", str(other), "--overwrite"]) == 0
    assert two[0].read_bytes() == before


def test_families_and_kinds_are_not_mixed(
    tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "sum.safetensors")
    xl = write(tmp_path / "xl.safetensors", tensors_of(3), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert main(["merge", str(two[0]), str(xl), "--save_to", target]) == 2
    assert "different families" in capsys.readouterr().err
    pair = {f"{LINEAR}.hada_w{n}_{end}": torch.ones(3, 3) for n in (1, 2) for end in "ab"}
    loha = write(tmp_path / "loha.safetensors", pair)
    assert main(["merge", str(two[0]), str(loha), "--save_to", target]) == 2
    assert "loha.safetensors is a LoHa, and only plain LoRA is merged" in capsys.readouterr().err
    wrong = write(tmp_path / "wide.safetensors", tensors_of(3, names={LINEAR: (12, 11)}))
    assert main(["merge", str(two[0]), str(wrong), "--save_to", target]) == 2
    assert f"{LINEAR}: its weight has the shapes [12, 10] and [12, 11]" in capsys.readouterr().err
    nan = tensors_of(3)
    nan[f"{TEXT}.lora_up.weight"][0, 0] = torch.nan
    assert main(["merge", str(two[0]), str(write(tmp_path / "nan.safetensors", nan)), "--save_to", target]) == 2
    assert f"{TEXT}.lora_up.weight holds NaN" in capsys.readouterr().err


def test_other_bases_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        write(tmp_path / f"{seed}.safetensors", tensors_of(seed), {"ss_sd_model_hash": str(seed)}) for seed in (1, 2)
    ]
    assert main(["merge", *map(str, files), "--save_to", str(tmp_path / "sum.safetensors")]) == 0
    assert "trained on different base models (ss_sd_model_hash)" in capsys.readouterr().err


def test_a_tucker_core_is_merged(tmp_path: Path) -> None:
    """With a wide kernel between 1 × 1 factors, into a plain pair."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_down.weight": (3, 6, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (8, 3, 1, 1)}
    own = {f"{WIDE}.{end}": torch.randn(shape, generator=generator) for end, shape in shapes.items()}
    file, target = write(tmp_path / "t.safetensors", own), tmp_path / "sum.safetensors"
    assert main(["merge", str(file), "--weights", "2", "--save_to", str(target)]) == 0
    down, mid, up = (own[f"{WIDE}.{end}"].double() for end in shapes)
    expected = 2 * torch.einsum("pqhw,qi,op->oihw", mid, down[..., 0, 0], up[..., 0, 0])
    assert _close(deltas(load_file(target))[WIDE], expected.flatten(1))


# -- resizing


@pytest.mark.parametrize(
    ("method", "parameter", "count"),
    # of 8, 4, 2, 1: squares 64, 16, 4, 1 of 85; sums 8, 12, 14, 15
    [
        ("sv_ratio", 2.0, 1),
        ("sv_ratio", 2.1, 2),
        ("sv_ratio", 100.0, 4),
        ("sv_fro", (64 / 85) ** 0.5, 1),
        ("sv_fro", 0.9, 2),
        ("sv_fro", 1.0, 4),
        ("sv_cumulative", 0.5, 1),
        ("sv_cumulative", 0.8, 2),
        ("sv_cumulative", 0.81, 3),
        ("sv_cumulative", 1.0, 4),
    ],
)
def test_dynamic_methods_keep_the_fewest(method: str, parameter: float, count: int) -> None:
    assert count_of(torch.tensor([8.0, 4.0, 2.0, 1.0]), method, parameter) == count


def test_a_layer_of_zeros_keeps_one() -> None:
    for method in ("sv_ratio", "sv_fro", "sv_cumulative"):
        assert count_of(torch.zeros(4), method, 1.0) == 1


def test_resizing_is_the_best_of_its_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, target = write(tmp_path / "a.safetensors", tensors_of(1, rank=6)), tmp_path / "small.safetensors"
    words = ["--rank", "3", "--conv_rank", "2", "--save_to", str(target)]
    assert main(["resize", str(file), *words]) == 0
    kept = whole = 0.0
    found = deltas(load_file(target))
    for name, delta in deltas(load_file(file)).items():
        values = torch.linalg.svdvals(delta)
        count = 2 if name == WIDE else 3
        assert float((found[name] - delta).norm()) == pytest.approx(float(values[count:].norm()), rel=1e-4)
        kept, whole = kept + float(values[:count].square().sum()), whole + float(values.square().sum())
    assert f"kept {100 * kept / whole:.2f} % of the energy" in capsys.readouterr().out
    assert read_metadata(target)["ss_network_dim"] == "Dynamic"


def test_a_rank_above_the_files_changes_nothing(tmp_path: Path) -> None:
    file, target = write(tmp_path / "a.safetensors", tensors_of(1, rank=3)), tmp_path / "same.safetensors"
    assert main(["resize", str(file), "--rank", "64", "--save_to", str(target)]) == 0
    before, after = deltas(load_file(file)), deltas(load_file(target))
    assert all(_close(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dynamic_param", "0.9"], "--dynamic_param has no effect without --dynamic_method"),
        (["--dynamic_method", "sv_fro"], "needs a --dynamic_param"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "2"], "takes a share above 0, up to 1"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "sv_ratio takes 1 or more"),
    ],
)
def test_wrong_options_of_resize(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.safetensors", tensors_of(1))
    assert main(["resize", str(file), "--rank", "2", *words, "--save_to", str(tmp_path / "b.safetensors")]) == 2
    assert said in capsys.readouterr().err


# -- factors


def test_a_rank_above_the_layers_sides_is_decomposed() -> None:
    """More ranks than rows: both QR have fewer columns than there are ranks."""
    generator = torch.Generator().manual_seed(0)
    wide = Factors(torch.randn(4, 9, generator=generator), torch.randn(9, 6, generator=generator), (4, 6))
    assert torch.allclose(wide.values(), torch.linalg.svdvals(wide.dense()), rtol=1e-5)
    assert torch.allclose(truncated(wide, 9).dense(), wide.dense(), atol=1e-5)
    assert wide.norm() == pytest.approx(float(wide.dense().norm()), rel=1e-6)


def test_an_alpha_of_zero_is_the_rank() -> None:
    own = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(0.0)}
    assert torch.equal(factors_of(own).dense(), torch.full((4, 3), 2.0))


# -- the command


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from networks.tools.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in (["--help"], ["merge", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *words], check=False).returncode == 0
