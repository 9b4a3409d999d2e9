"""fp8 files with a scale beside each weight: of all families that read files of parts, the numbers times the scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models.family import ModelFamily
from library.models.opening import open_family
from networks.tools.into_checkpoint import _patches
from tests import tiny_anima, tiny_chroma, tiny_flux, tiny_z_image

LARGEST = 448.0  # of float8_e4m3fn
FAMILIES = {"flux": tiny_flux, "chroma": tiny_chroma, "anima": tiny_anima, "z_image": tiny_z_image}
STYLES = ("scale_weight", "weight_scale")


def scaled(tensors: Mapping[str, Tensor], style: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as ComfyUI has it, older or newer, with all matrices in fp8; and the numbers that it stands for."""
    file, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            factor = weight.abs().max().clamp(min=1e-6) / LARGEST
            file[name] = (weight / factor).to(torch.float8_e4m3fn)
            exact[name] = file[name].float() * factor
            if style == "scale_weight":
                file |= {f"{layer}.scale_weight": factor.view(1), f"{layer}.scale_input": torch.ones(1)}
            else:
                packing = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
                file |= {f"{layer}.weight_scale": factor, f"{layer}.comfy_quant": packing}
    if style == "scale_weight":
        file["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return file, exact


def files_of(name: str, folder: Path, target: Path) -> dict[str, Path]:
    module: Any = FAMILIES[name]
    found: dict[str, Path] = module.single_files(folder, target)
    return found


def opened(files: Mapping[str, Path]) -> ModelFamily:
    own = {option: str(path) for option, path in files.items()}
    return open_family(own.pop("pretrained_model_name_or_path"), vae=own.pop("vae", None), options=own)


def loaded(files: Mapping[str, Path], part: str, dtype: torch.dtype) -> dict[str, Tensor]:
    module = opened(files).components.load(part, dtype, "cpu")
    return dict(module.named_parameters())


@pytest.fixture
def folders(tiny_flux: Path, tiny_chroma: Path, tiny_anima: Path, tiny_z_image: Path) -> dict[str, Path]:
    return {"flux": tiny_flux, "chroma": tiny_chroma, "anima": tiny_anima, "z_image": tiny_z_image}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("name", "option", "part"),
    [
        ("flux", "pretrained_model_name_or_path", "denoiser"),  # with layers that are rows of one, or exchanged
        ("flux", "t5xxl", "text_encoder_2"),
        ("chroma", "pretrained_model_name_or_path", "denoiser"),
        ("anima", "pretrained_model_name_or_path", "denoiser"),
        ("anima", "pretrained_model_name_or_path", "text_encoder_2"),
        ("z_image", "pretrained_model_name_or_path", "denoiser"),
        ("z_image", "qwen3", "text_encoder"),
    ],
)
def test_the_weights_are_the_numbers_times_their_scales(
    folders: dict[str, Path], tmp_path: Path, name: str, option: str, part: str, style: str
) -> None:
    files = files_of(name, folders[name], tmp_path)
    file, exact = scaled(load_file(files[option]), style)
    save_file(file, tmp_path / "scaled.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        found = loaded({**files, option: tmp_path / "scaled.safetensors"}, part, dtype)
        expected = loaded({**files, option: tmp_path / "exact.safetensors"}, part, dtype)
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(found[key], weight), key


def test_they_are_packed_like_others(folders: dict[str, Path], tmp_path: Path) -> None:
    """--base_format: from the numbers times their scales."""
    from library.quantization.frozen import Held

    files = files_of("z_image", folders["z_image"], tmp_path)
    option, held = "pretrained_model_name_or_path", Held("int8", "--base_format int8")
    file, exact = scaled(load_file(files[option]), "scale_weight")
    layers = []
    for title, tensors in (("scaled", file), ("exact", exact)):
        save_file(tensors, tmp_path / f"{title}.safetensors")
        family = opened({**files, option: tmp_path / f"{title}.safetensors"})
        denoiser = family.components.load("denoiser", torch.float32, "cpu", held=held)
        layers.append(denoiser.get_submodule("layers.0.attention.to_k"))
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layers[0](x), layers[1](x))


def test_another_scale_is_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """A cache of texts is of one encoder."""
    files = files_of("z_image", folders["z_image"], tmp_path)
    file, _ = scaled(load_file(files["qwen3"]), "scale_weight")
    found = []
    for factor in (1.0, 2.0):
        name = "model.layers.1.mlp.up_proj.scale_weight"
        save_file({**file, name: file[name] * factor}, tmp_path / f"{factor}.safetensors")
        found.append(opened({**files, "qwen3": tmp_path / f"{factor}.safetensors"}).text_fingerprint())
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"layers.0.feed_forward.w1.weight_scale": torch.ones(4, 4)}, r"w1.weight_scale' belongs to a packed weight"),
        ({"layers.0.feed_forward.w1.weight_scale_2": torch.ones(1)}, r"w1.weight_scale_2' belongs to a packed weight"),
        (
            {
                "layers.0.feed_forward.w1.weight_scale": torch.ones(1),
                "layers.0.feed_forward.w1.weight": torch.zeros(4, 4, dtype=torch.int8),
            },
            r"w1.weight_scale' belongs to a packed weight, which is not supported; bf16, fp16, fp8 and fp8 with one",
        ),
        ({"layers.0.feed_forward.other.weight_scale": torch.ones(1)}, r"1 unknown: layers.0.feed_forward.other.wei"),
    ],
)
def test_other_packings_are_refused(
    folders: dict[str, Path], tmp_path: Path, more: dict[str, Tensor], said: str
) -> None:
    files = files_of("z_image", folders["z_image"], tmp_path)
    option = "pretrained_model_name_or_path"
    save_file({**load_file(files[option]), **more}, tmp_path / "packed.safetensors")
    with pytest.raises(UserError, match=said), opened({**files, option: tmp_path / "packed.safetensors"}).outlined():
        pass


def test_nothing_is_merged_into_such_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """The sum would need another scale."""
    files = files_of("flux", folders["flux"], tmp_path)
    option, path = "pretrained_model_name_or_path", tmp_path / "scaled.safetensors"
    save_file(scaled(load_file(files[option]), "scale_weight")[0], path)
    family = opened({**files, option: path})
    change: Any = SimpleNamespace(by_rows=lambda leaf: None, whole=lambda leaf: None)
    with family.outlined():
        layer = family.components["denoiser"].get_submodule("transformer_blocks.0.attn.to_q")
        with pytest.raises(UserError, match=r"scaled.safetensors: its fp8 weights have scales .* merge into a file in"):
            _patches(family, {layer: change})
