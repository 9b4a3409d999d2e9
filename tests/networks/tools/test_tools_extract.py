"""A LoRA from two base models, against differences that are put into one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tool_files import deltas
from torch import Tensor

from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from library.models import opening
from library.models.checkpoints.single_file import open_file
from library.models.family import ModelFamily
from library.models.opening import open_family
from library.models.stable_diffusion_xl import StableDiffusionXL
from networks.merge import BaseWeights
from networks.tools import low_rank
from networks.tools.__main__ import main
from networks.tools.extract import clipped
from tests.conftest import BASE
from tests.merging import merge_into
from tests.models.original_layout import sdxl_file, weights_of
from tests.tiny_sdxl import configuration

UNET, TEXT = Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE, NORM = "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1"
FLOAT = ["--save_precision", "float"]


def named(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def change(file: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Write the file with these weights changed, in fp32; returns the differences by name."""
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    made = {name: make(tensors[name]) for name, make in changes.items()}
    save_file({**tensors, **{name: tensors[name] + more for name, more in made.items()}}, file)
    return made


def of_rank(rank: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A random difference of this rank, of the size of the weight."""

    def make(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        up = torch.randn(len(weight), rank, generator=generator)
        return (0.1 * up @ torch.randn(rank, weight[0].numel(), generator=generator)).view(weight.shape)

    return make


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A copy of the quickstart's base, to be changed."""
    return shutil.copytree(BASE, tmp_path / "tuned")


def test_a_difference_of_low_rank_comes_out_whole(
    tmp_path: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers without a difference are left out, and a norm's is counted."""
    more = change(
        tuned / UNET,
        {
            f"{QUERY}.weight": of_rank(3),
            f"{WIDE}.weight": of_rank(2),
            f"{NORM}.weight": lambda weight: weight * 0 + 0.5,
        },
    )
    target = tmp_path / "lora.safetensors"
    words = ["extract", str(BASE), str(tuned), "--rank", "3", "--conv_rank", "2", *FLOAT, "--save_to", str(target)]
    assert main(words) == 0
    tensors = load_file(target)
    found = deltas(tensors)
    assert found.keys() == {named(QUERY), named(WIDE)}
    for path in (QUERY, WIDE):  # within the rounding of weight + difference to fp32
        assert (found[named(path)] - more[f"{path}.weight"].flatten(1)).abs().max() < 1e-5
    assert tensors[f"{named(QUERY)}.lora_down.weight"].shape[0] == 3
    assert tensors[f"{named(WIDE)}.lora_up.weight"].shape[1:] == (2, 1, 1)
    said = capsys.readouterr().out
    assert "UNet: 2 of 178 layers differ, 100.00 % of their difference's energy kept" in said
    norm, layers = (float(sum(more[f"{p}.weight"].square().sum() for p in own)) for own in ((NORM,), (QUERY, WIDE)))
    assert f"{100 * norm / (norm + layers):.2f} % of all energy is in 1 weights that are left out" in said
    assert f"such as {NORM}.weight" in said
    assert "text encoder: the same in both models" in said


def test_without_a_rank_of_convolutions_they_are_left_out(tmp_path: Path, tuned: Path) -> None:
    change(tuned / UNET, {f"{QUERY}.weight": of_rank(1), f"{WIDE}.weight": of_rank(1)})
    target = tmp_path / "lora.safetensors"
    assert main(["extract", str(BASE), str(tuned), "--rank", "2", "--save_to", str(target)]) == 0
    assert deltas(load_file(target)).keys() == {named(QUERY)}


def test_the_kept_energy_is_that_of_the_largest_values(
    tmp_path: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eckart, Young 1936."""
    more = change(tuned / UNET, {f"{QUERY}.weight": of_rank(6)})
    words = [*FLOAT, "--save_to", str(tmp_path / "lora.safetensors")]
    assert main(["extract", str(BASE), str(tuned), "--rank", "2", *words]) == 0
    energies = torch.linalg.svdvals(more[f"{QUERY}.weight"].double()).square()
    assert f"{100 * float(energies[:2].sum() / energies.sum()):.2f} % of" in capsys.readouterr().out


def test_base_and_lora_are_the_tuned_model_in_both_layouts_of_sdxl(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diffusers folder against a single file in the original layout, whose second text encoder has fused weights."""

    def opened(path: str, **_: object) -> ModelFamily:
        """Single files have no configuration: that of the tiny model takes the place of SDXL's."""
        if Path(path).is_dir():
            return open_family(path)
        return StableDiffusionXL(open_file(path, Path(path), kind="sdxl", config=configuration()), vae=None)

    monkeypatch.setattr(opening, "open_family", opened)
    tuned = shutil.copytree(tiny_sdxl, tmp_path / "tuned")
    key = next(name for name in load_file(tuned / UNET) if name.endswith("attn2.to_k.weight"))
    second = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    more = change(tuned / UNET, {key: of_rank(2)})
    more_text = change(tuned / "text_encoder_2" / "model.safetensors", {second: of_rank(1)})
    weights, single = weights_of(tuned), tmp_path / "tuned.safetensors"
    unet, vae, text, text_2 = (weights[name] for name in ("unet", "vae", "text", "text_2"))
    states = sdxl_file(unet, vae, text, text_2, configuration())
    save_file({name: tensor.contiguous() for name, tensor in states.items()}, single)
    target = tmp_path / "lora.safetensors"
    assert main(["extract", str(tiny_sdxl), str(single), "--rank", "2", *FLOAT, "--save_to", str(target)]) == 0

    family = open_family(str(tiny_sdxl))
    merged = BaseWeights([str(target)], [1.0])
    family.components.load_all(("denoiser", "text_encoder", "text_encoder_2"), torch.float32, "cpu")
    before = {name: family.components[name].get_parameter(path).clone() for name, path in _places(key, second)}
    merge_into(merged, family.adapter_targets())
    for (name, path), expected in zip(_places(key, second), (more[key], more_text[second]), strict=True):
        added = family.components[name].get_parameter(path) - before[name]
        assert (added.detach() - expected).abs().max() < 1e-5
    assert len(deltas(load_file(target))) == 2
    assert read_metadata(target)["ss_base_model_version"] == "sdxl_base_v1-0"


def _places(key: str, second: str) -> list[tuple[str, str]]:
    return [("denoiser", key), ("text_encoder_2", second)]


def test_min_diff_is_about_text_encoders(tmp_path: Path, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "encoder.layers.0.mlp.fc1"
    change(tuned / UNET, {f"{QUERY}.weight": lambda weight: weight * 0 + 1e-3})
    change(tuned / TEXT, {f"{name}.weight": lambda weight: weight * 0 + 2e-3})
    for number, (least, layers) in enumerate((("0.003", 1), ("0.001", 2))):
        target = tmp_path / f"{number}.safetensors"
        words = ["--rank", "1", "--min_diff", least, "--save_to", str(target)]
        assert main(["extract", str(BASE), str(tuned), *words]) == 0
        assert len(deltas(load_file(target))) == layers
        assert ("text encoder: left out, no value differs by more than 0.00" in capsys.readouterr().out) == (
            layers == 1
        )


def test_factors_are_clipped_as_by_kohya() -> None:
    """U · σ and Vᵀ at the quantile of the values of both."""
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    found = clipped(delta, (40, 30), 5, 0.9)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    up, down = left[:, :5] * values[:5], right[:5]
    highest = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.9)
    assert torch.allclose(found.up, up.clamp(-highest, highest))
    assert torch.allclose(found.down, down.clamp(-highest, highest))


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_the_randomised_decomposition_is_nearly_the_best(shape: tuple[int, int]) -> None:
    """Singular values that fall as 1 / √k: at least 99.9 % of the best energy, the same bits each time, and torch's own
    random numbers stay where they are."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    values = torch.arange(1, 301).float().rsqrt()
    delta, state = (u * values) @ v, torch.get_rng_state()
    first, second = low_rank.largest(delta, 12), low_rank.largest(delta, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert 0.999 <= float(first[1].square().sum() / values[:12].square().sum()) <= 1 + 1e-5
    left, sigma, right = first
    assert float((delta - (left * sigma) @ right).norm()) == pytest.approx(float(values[12:].norm()), rel=1e-3)
    assert torch.allclose(low_rank.largest(delta, 12, exact=True)[1], values[:12], rtol=1e-4)


def test_the_metadata_say_what_it_is(tmp_path: Path, tuned: Path) -> None:
    change(tuned / UNET, {f"{QUERY}.weight": of_rank(1)})
    target = tmp_path / "lora.safetensors"
    words = ["--rank", "2", "--conv_rank", "1", "--clamp_quantile", "0.99", "--save_to", str(target)]
    assert main(["extract", str(BASE), str(tuned), *words]) == 0
    metadata = read_metadata(target)
    rows = json.loads(metadata["ss_made_from"])
    assert [(row["name"], row["weight"]) for row in rows] == [("base", -1.0), ("tuned", 1.0)]
    assert metadata["ss_made_by"] == "extract to rank 2 (convolutions 1), clipped at the quantile 0.99"
    assert (metadata["ss_v2"], metadata["ss_sd_model_name"], metadata["ss_network_dim"]) == ("False", "base", "2")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["sshs_model_hash"] == safetensors_hashes(target)["sshs_model_hash"]


def test_what_is_refused(tmp_path: Path, tuned: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["--save_to", str(tmp_path / "lora.safetensors")]

    def said(*words: str) -> str:
        assert main(["extract", *words, *target]) == 2
        assert not (tmp_path / "lora.safetensors").exists()
        return capsys.readouterr().err

    assert "no layer that a LoRA sits on differs" in said(str(BASE), str(tuned), "--rank", "2")
    assert "their difference is no LoRA" in said(str(BASE), str(tiny_sdxl), "--rank", "2")
    assert "--rank: must be at least 1, not 0" in said(str(BASE), str(tuned), "--rank", "0")
    assert "--clamp_quantile 0: takes a share" in said(str(BASE), str(tuned), "--rank", "1", "--clamp_quantile", "0")
    assert "--min_diff: must be at least 0, not -1" in said(str(BASE), str(tuned), "--rank", "1", "--min_diff", "-1")
    change(tuned / UNET, {f"{QUERY}.weight": lambda weight: weight * 0 + float("nan")})
    assert f"UNet, {QUERY}.weight holds NaN or infinity" in said(str(BASE), str(tuned), "--rank", "1")
