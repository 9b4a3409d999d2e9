"""What every family must do, over the registry: a new one is tested here as soon as it has a small model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from library.models import FAMILIES
from library.models.family import ModelFamily
from library.models.opening import open_family
from networks.create import create
from networks.settings import Asked
from tests.conftest import BASE
from tests.quick import slow

CAPTIONS = ["a cat", "a dog, at night", ""]
SIZES: dict[str, Any] = {"original_sizes": [(70, 64), (64, 90), (64, 64)], "crops": [(3, 0), (0, 13), (0, 0)]}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelFamily:
    name = request.param
    family = open_family(str(BASE if name == "sd" else request.getfixturevalue(f"tiny_{name}")))
    assert name == family.NAME
    family.components.load("vae", torch.float32, "cpu")
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    family.components.load("denoiser", torch.float32, "cpu")
    return family


def conditions(family: ModelFamily) -> dict[str, torch.Tensor]:
    return family.condition(family.encode_prompts(CAPTIONS), **SIZES, target_size=(64, 64))


def noise(family: ModelFamily) -> torch.Tensor:
    side = 64 // family.latents.factor
    shape = (len(CAPTIONS), family.latents.channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_it_has_every_member_of_the_protocol(family: ModelFamily) -> None:
    members = {name for name in (*ModelFamily.__annotations__, *vars(ModelFamily)) if not name.startswith("_")}
    assert not [name for name in members if not hasattr(family, name)]


@torch.no_grad()
def test_images_become_scaled_distributions(family: ModelFamily) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = family.encode_images(pixels)
    assert (
        mean.shape
        == std.shape
        == (2, family.latents.channels, 64 // family.latents.factor, 96 // family.latents.factor)
    )
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all() or not std.any(), "a distribution everywhere, or its middle alone"
    assert torch.allclose(family.encode_images(pixels[1:])[0][0], mean[1], atol=1e-5)


USUAL_SCALE = {"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305}
USUAL_SCALE |= dict.fromkeys(("flux", "chroma", "z_image"), 0.3611)
LONGER: dict[str, dict[str, Any]] = {
    "flux": {"t5xxl_max_token_length": 128},
    "chroma": {"t5xxl_max_token_length": 128},
    "anima": {"t5_max_token_length": 128},
    "flux2": {"qwen3_max_token_length": 128},
    "z_image": {"qwen3_max_token_length": 128},
    "sd3": {"t5xxl_max_token_length": 128},
}
"""The option by which each reads longer captions, if not --max_token_length."""


@pytest.mark.parametrize(
    "stated", [slow({}), {"scaling_factor": None}, slow({"scaling_factor": 0.25}), {"shift_factor": 0.75}]
)
@torch.no_grad()
def test_latents_are_decoded_with_the_scale_that_they_were_encoded_with(
    stated: dict[str, Any], family: ModelFamily, tmp_path: Path
) -> None:
    """Also where the VAE's configuration has none, for which diffusers takes Stable Diffusion 1's for every model."""
    if family.NAME not in USUAL_SCALE:
        pytest.skip("its VAE has a scale for each channel, which its configuration always has")
    shutil.copytree(family.path, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "config.json"
    config = json.loads(file.read_text())
    config.pop("scaling_factor", None)
    file.write_text(json.dumps(config | stated))
    shift = stated.get("shift_factor", config.get("shift_factor") or 0.0)
    opened = open_family(str(tmp_path / "model"))
    opened.components.load_all(opened.PARTS, torch.float32, "cpu")

    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = opened.components["vae"].encode(pixels).latent_dist.mean
    scale = stated.get("scaling_factor") or USUAL_SCALE[opened.NAME]
    mean, _ = opened.encode_images(pixels)
    assert torch.equal(mean, (latents - shift) * scale)
    expected = opened.components["vae"].decode(latents).sample
    torch.testing.assert_close(opened.decode_latents(mean), expected, rtol=0, atol=1e-4)  # scaled there and back
    if opened.NAME not in ("flux", "chroma", "z_image", "sd3"):  # their pipeline ends with latents
        assert opened.pipeline().vae.config.scaling_factor == scale
    if not stated:
        file.write_text(json.dumps(config | {"scaling_factor": scale}))
        same = open_family(str(tmp_path / "model"))
        assert same.vae_fingerprint() == opened.vae_fingerprint()  # a cache of another scale is another one


@torch.no_grad()
def test_what_a_sample_gets_does_not_depend_on_its_batch(family: ModelFamily) -> None:
    """So a cache equals encoding anew: texts are kept one by one."""
    texts, condition, noisy = family.encode_prompts(CAPTIONS), conditions(family), noise(family)
    assert all(len(value) == len(CAPTIONS) for value in condition.values())
    t = family.process.at(torch.tensor([3, 500, 998]))
    answer = family.predict(noisy, t, condition)
    assert answer.shape == noisy.shape
    for i, caption in enumerate(CAPTIONS):
        alone = family.encode_prompts([caption])
        assert alone.keys() == texts.keys()
        for name, whole in texts.items():
            own, length = alone[name][0], len(alone[name][0])
            assert torch.allclose(own, whole[i][:length], atol=1e-5)
            assert not whole[i][length:].any(), "a cache, too, fills a shorter text up with zeros"
        one = {name: value[i : i + 1] for name, value in condition.items()}
        assert torch.allclose(family.predict(noisy[i : i + 1], t[i : i + 1], one)[0], answer[i], atol=1e-4)
    other = {name: value.flip(0) for name, value in condition.items()}
    assert not torch.allclose(family.predict(noisy, t, other)[0], answer[0], atol=1e-4), "the text has no effect"


def test_every_part_learns(family: ModelFamily) -> None:
    network = create("lora", family.adapter_targets(), Asked(dim=2, alpha=1.0), {"conv_dim": 2})
    network.attach()
    try:
        for adapter in network.adapters:
            torch.nn.init.constant_(adapter.lora_up.weight, 0.01)  # type: ignore[attr-defined]
        level = family.process.at(torch.tensor([3, 500, 998]))
        family.predict(noise(family), level, conditions(family)).square().mean().backward()
        for section, adapters in network.sections().items():
            taught = [a.lora_down.weight.grad is not None for a in adapters]  # type: ignore[attr-defined]
            assert sum(taught) >= 0.6 * len(taught), section  # a layer that is not read learns nothing
    finally:
        network.detach()


def test_the_pipeline_takes_the_familys_own_words(family: ModelFamily) -> None:
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        words = family.pipeline_arguments(family.encode_prompts(["a cat"]), family.encode_prompts([""]))
        size: dict[str, Any] = {
            "width": 64,
            "height": 64,
            "num_inference_steps": 2,
            "output_type": "latent",
            "guidance_scale": 7.5,
        }
        if family.rendering.guidance is not None:
            size["embedded_guidance"] = family.rendering.guidance
        images = [pipeline(**words, **size, generator=torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1)]
    assert images[0].shape == (1, family.latents.channels, 64 // family.latents.factor, 64 // family.latents.factor)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_fingerprints_tell_the_parts_apart_and_stay(family: ModelFamily) -> None:
    assert (
        family.vae_fingerprint() == family.vae_fingerprint() != family.text_fingerprint() == family.text_fingerprint()
    )
    longer = open_family(family.path, options=LONGER.get(family.NAME, {"max_token_length": 150}))
    assert longer.text_fingerprint() != family.text_fingerprint()
    assert longer.vae_fingerprint() == family.vae_fingerprint()
