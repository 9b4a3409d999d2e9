"""Other kinds of adapters as LoRA, against the differences that the kinds themselves make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tool_files import LINEAR, POINT, WIDE, deltas, tensors_of, write
from torch import Tensor

from library.files.header import read_metadata
from library.models.family import ModelFamily
from library.models.opening import open_family
from networks.create import create
from networks.network import Network
from networks.settings import Asked
from networks.tools.__main__ import main
from tests.conftest import BASE
from tests.quick import slow

WHOLE = ["--rank", "10000"]  # above every layer's


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    found = open_family(str(BASE))
    found.components.load_all(("denoiser", "text_encoder"), torch.float32, "cpu")
    return found


def saved(
    family: ModelFamily, path: Path, kind: str, asked: Asked, arguments: dict[str, Any], part: str = "denoiser"
) -> dict[str, Tensor]:
    """Write a file of random adapters of this kind; returns each layer's difference."""
    network: Network = create(kind, family.adapter_targets(part), asked, arguments)
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1).add_(0.02)
    network.save(path, torch.float32, {"ss_base_model_version": "sd_v1"})
    with torch.no_grad():
        return {adapter.site.name: adapter.delta() for adapter in network.adapters}


def assert_same(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Within fp32's rounding, in the shapes of the layers."""
    tensors = load_file(path)
    found = deltas(tensors)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        assert (len(up), *down.shape[1:]) == tuple(delta.shape), name
        error = float((found[name] - delta.flatten(1)).norm())
        assert error <= 2e-5 * float(delta.norm()) + 1e-6, (name, error, float(delta.norm()))


KRONECKER = {"factor": 4, "decompose_both": True}


@pytest.mark.parametrize(
    ("kind", "asked", "arguments", "more"),
    [
        ("lora", Asked(dim=3, alpha=1.5), {"conv_dim": 2, "use_tucker": True}, []),
        ("loha", Asked(dim=2, alpha=1.0), {}, []),
        ("lokr", Asked(dim=1, alpha=0.5), KRONECKER, []),
        ("full", Asked(), {"enable_conv": True}, WHOLE),
    ],
)
def test_kinds_that_need_no_base(
    tmp_path: Path, family: ModelFamily, kind: str, asked: Asked, arguments: dict[str, Any], more: list[str]
) -> None:
    """Exact, also without --rank where the kind is of low rank; UNet of 1 × 1 convolutions and Linear layers."""
    source, target = tmp_path / "source.safetensors", tmp_path / "lora.safetensors"
    expected = saved(family, source, kind, asked, arguments)
    assert main(["convert", str(source), str(target), "--to", "lora", *more]) == 0
    assert_same(target, expected)


@pytest.mark.parametrize(
    ("kind", "asked", "arguments"),
    [
        ("loha", Asked(dim=2, alpha=1.0), {"conv_dim": 2, "use_tucker": True}),
        slow(("loha", Asked(dim=6, alpha=2.0), {"conv_dim": 3})),
        slow(("lokr", Asked(dim=2, alpha=1.0), {"conv_dim": 2})),
        slow(("lokr", Asked(dim=100000, alpha=1.0), {"conv_dim": 100000})),
        ("dora", Asked(dim=2, alpha=1.0), {"conv_dim": 2}),
        slow(("loha", Asked(dim=2, alpha=1.0), {"dora_wd": True})),
        ("oft", Asked(dim=4), {}),
        slow(("boft", Asked(dim=6), {})),
        slow(("ia3", Asked(), {})),
        ("glora", Asked(dim=3, alpha=2.0), {"conv_dim": 2}),
    ],
)
def test_with_the_base_every_kind_is_a_lora(
    tmp_path: Path, family: ModelFamily, kind: str, asked: Asked, arguments: dict[str, Any]
) -> None:
    """At the full rank the difference is the kind's own, convolutions included."""
    source, target = tmp_path / "source.safetensors", tmp_path / "lora.safetensors"
    expected = saved(family, source, kind, asked, arguments)
    assert main(["convert", str(source), str(target), "--to", "lora", *WHOLE, "--base", str(BASE)]) == 0
    assert_same(target, expected)


def test_a_lokr_is_cut_to_the_largest_products(
    tmp_path: Path, family: ModelFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the decomposition of the whole difference cuts it, and the kept share is that."""
    source, target = tmp_path / "lokr.safetensors", tmp_path / "lora.safetensors"
    expected = saved(family, source, "lokr", Asked(dim=100000), {}, "text_encoder")
    assert main(["convert", str(source), str(target), "--to", "lora", "--rank", "3"]) == 0
    kept = whole = 0.0
    for name, delta in deltas(load_file(target)).items():
        values = torch.linalg.svdvals(expected[name].double())
        assert float((delta - expected[name]).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-3)
        kept, whole = kept + float(values[:3].square().sum()), whole + float(values.square().sum())
    assert f"kept {100 * kept / whole:.2f} % of the energy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("networks.dylora", {"unit": 4}), ("networks.lycoris", {"block_size": 4, "algo": "dylora"})],
)
def test_a_dylora_is_cut_to_its_first_ranks(
    module: str, arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """alpha · √(b / r), the strength at which they were trained, and the ranks themselves as they are."""
    tensors = tensors_of(0, rank=8, alpha=4.0)
    metadata = {"ss_network_module": module, "ss_network_args": json.dumps(arguments)}
    source, target = write(tmp_path / "dylora.safetensors", tensors, metadata), tmp_path / "lora.safetensors"
    assert main(["convert", str(source), str(target), "--to", "lora", "--rank", "2"]) == 0
    found = load_file(target)
    for name in (LINEAR, WIDE):
        assert torch.equal(found[f"{name}.lora_down.weight"], tensors[f"{name}.lora_down.weight"][:2])
        assert torch.equal(found[f"{name}.lora_up.weight"], tensors[f"{name}.lora_up.weight"][:, :2])
        assert float(found[f"{name}.alpha"]) == 2.0  # 4 · √(2 / 8)
    assert "--rank 2: was never trained alone, it is no multiple of the file's unit 4" in capsys.readouterr().err
    assert read_metadata(target)["ss_network_dim"] == "2"
    assert read_metadata(target)["ss_network_module"] == "networks.lora"


def test_shapes_that_the_tensors_do_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flat LoHa: proj_in is a convolution in SD 1 and Linear in SDXL; a wide convolution has a kernel."""

    def loha(name: str) -> dict[str, Tensor]:
        flat = {"w1_a": (8, 2), "w1_b": (2, 90), "w2_a": (8, 2), "w2_b": (2, 90)}
        return {f"{name}.hada_{end}": torch.randn(shape) for end, shape in flat.items()}

    target = tmp_path / "lora.safetensors"

    def run(name: str, version: str) -> int:
        target.unlink(missing_ok=True)
        source = write(tmp_path / "loha.safetensors", loha(name), {"ss_base_model_version": version or "None"})
        return main(["convert", str(source), str(target), "--to", "lora", "--rank", "1"])

    for name, version, shape in (
        (POINT, "sd_v1", (1, 90, 1, 1)),
        (POINT, "sdxl_base_v1-0", (1, 90)),
        (LINEAR, "", (1, 90)),
    ):
        assert run(name, version) == 0
        assert load_file(target)[f"{name}.lora_down.weight"].shape == shape
    for name, version in ((POINT, ""), (WIDE, "sd_v1")):
        assert run(name, version) == 2
        assert f"{name} may be a convolution, and its tensors do not show which: give --base" in capsys.readouterr().err


def test_what_a_lora_cannot_have_is_said(
    tmp_path: Path, family: ModelFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    """Differences of biases and norms."""
    source, target = tmp_path / "full.safetensors", tmp_path / "lora.safetensors"
    saved(family, source, "full", Asked(), {"train_norm": True})
    assert main(["convert", str(source), str(target), "--to", "lora", "--rank", "2"]) == 0
    assert "a LoRA has no differences of norms and biases, which are left out" in capsys.readouterr().err
    assert not any("norm" in name for name in deltas(load_file(target)))


@pytest.mark.parametrize(
    ("kind", "asked", "words", "said"),
    [
        ("dora", Asked(dim=2), ["--rank", "2"], "its difference depends on the base's weights: give --base"),
        ("oft", Asked(dim=4), ["--rank", "2"], "its difference depends on the base's weights: give --base"),
        ("full", Asked(), [], "its difference is of no low rank: give --rank"),
        ("lokr", Asked(dim=100000), [], "which is no low one: give --rank"),
        ("lora", Asked(dim=2), ["--rank", "0"], "--rank: must be at least 1, not 0"),
        ("lora", Asked(dim=2), ["--conv_rank", "2"], "--conv_rank has no effect without --rank"),
        ("lora", Asked(dim=2), ["--to", "kohya", "--rank", "2"], "--rank has no effect without --to lora"),
        ("norm", Asked(), ["--rank", "2"], "there are differences of norms alone"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    family: ModelFamily,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    asked: Asked,
    words: list[str],
    said: str,
) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "lora.safetensors"
    saved(family, source, kind, asked, {})
    assert main(["convert", str(source), str(target), "--to", "lora", *words]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


def test_a_file_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "other.safetensors"
    save_file(tensors_of(0, names={LINEAR: (12, 10)}), source)
    words = ["convert", str(source), str(tmp_path / "lora.safetensors"), "--to", "lora", "--base", str(BASE)]
    assert main(words) == 2
    assert f"1 layers are not those of {BASE}" in capsys.readouterr().err
