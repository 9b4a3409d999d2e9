"""The family "sd": the same model from every kind of file, its outputs, its adapter targets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import configuration
from torch import nn

from library.models.checkpoints.base_model import ASSETS, BaseModel, Part
from library.models.checkpoints.single_file import open_file
from library.models.family import AdapterTargets
from library.models.modules import new_text_encoder, new_unet
from library.models.opening import open_base_model, open_family
from library.models.stable_diffusion import StableDiffusion
from tests.quick import quick
from tests.rounding import BOUND

BASE = Path(__file__).parents[2] / "quickstart" / "base"
Make = Callable[..., StableDiffusion]


def _load(family: StableDiffusion, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    family.components.load("vae", dtype, "cpu")
    family.components.load_all(family.components.text_encoders, dtype, "cpu")
    family.components.load("denoiser", dtype, "cpu")
    return family


def _open(path: Path = BASE) -> StableDiffusion:
    family = open_family(str(path))
    assert isinstance(family, StableDiffusion)
    return family


def _modules(family: StableDiffusion) -> list[nn.Module]:
    return family.components.loaded()


def _outputs(family: StableDiffusion) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    noisy = torch.randn(2, 4, 8, 16, generator=generator)
    with torch.no_grad():
        condition = family.encode_prompts(["a cat", "a dog, at night"])
        return [
            *family.encode_images(pixels),
            *condition.values(),
            family.predict(noisy, torch.tensor([3, 998]), condition),
        ]


@pytest.mark.parametrize("name", ["sd1.safetensors", "sd1.ckpt", "sd1-old.ckpt", "sd2.safetensors"])
@pytest.mark.parametrize("dtype", quick([torch.float32, torch.float16], torch.float16))
def test_a_single_file_gives_exactly_what_the_folder_gives(
    family: Make, tiny_files: dict[str, Path], tiny_v2: Path, name: str, dtype: torch.dtype
) -> None:
    folder = tiny_v2 if name.startswith("sd2") else BASE
    config = configuration(folder, like=name[:3])
    options = {"v_parameterization": name.startswith("sd2")}
    single = _load(family(open_file(name, tiny_files[name], kind="sd", config=config), **options), dtype)
    whole = _load(_open(folder), dtype)
    for ours, theirs in zip(_modules(single), _modules(whole), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(_outputs(single), _outputs(whole), rtol=0, atol=BOUND[dtype])


def test_the_modules_are_those_that_diffusers_and_transformers_load() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    family = _load(_open())
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(BASE, subfolder="vae", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder", dtype=torch.float32)
    for found, expected in zip(_modules(family), (unet, vae, text), strict=True):
        assert type(found) is type(expected)
        states = expected.state_dict()
        assert found.state_dict().keys() == states.keys()
        assert all(torch.equal(tensor, states[name]) for name, tensor in found.state_dict().items())
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())
    pixels, noisy, t = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        condition = family.encode_prompts(["a cat"])
        expected = unet(noisy, t, condition["hidden_states"]).sample
        # torch.matmul goes another way where weights take gradients, as diffusers loads them
        torch.testing.assert_close(family.predict(noisy, t, condition), expected, rtol=0, atol=BOUND[torch.float32])
        latents = vae.encode(pixels).latent_dist
        mean, std = family.encode_images(pixels)
    for found, expected in ((mean, latents.mean), (std, latents.std)):
        torch.testing.assert_close(found, expected * vae.config.scaling_factor, rtol=0, atol=BOUND[torch.float32])
    assert mean.shape == (1, family.latents.channels, 64 // family.latents.factor, 64 // family.latents.factor)
    assert family.latents.factor == 4
    assert family.native_resolution == 64


def test_precision_is_the_weights_outside_autocast_and_the_vaes_own_within() -> None:
    family = _load(_open(), torch.bfloat16)
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([5])
    with torch.no_grad():
        condition = family.encode_prompts(["a cat"])
        assert family.predict(noisy, t, condition).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert family.predict(noisy, t, family.encode_prompts(["a cat"])).isfinite().all()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    family.components.load("vae", torch.float32, "cpu")
    exact = family.encode_images(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(family.encode_images(pixels), exact, strict=True))
    assert exact[0].dtype == torch.float32
    assert not exact[0].requires_grad


def test_parts_are_released() -> None:
    family = _load(_open())
    family.components.release("vae", *family.components.text_encoders)
    assert "vae" not in family.components
    assert family.components.loaded() == [family.components["denoiser"]]
    assert [target.part for target in family.adapter_targets()] == ["unet"]
    assert list(family.third_party_views()[0].named_modules())[1:] == []
    with pytest.raises(AssertionError, match="the part 'vae' is not loaded"):
        family.encode_images(torch.zeros(1, 3, 8, 8))


def test_the_schedule_is_that_of_stable_diffusion() -> None:
    table = _open().process.alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(table, (1 - betas).cumprod(0), rtol=1e-12, atol=0)  # fp64, a thousand roundings


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def true_size(request: pytest.FixtureRequest) -> StableDiffusion:
    """The true architectures, without weights."""
    config = json.loads((ASSETS / f"{request.param}.json").read_text())
    names = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
    parts = {name: Part(config[folder], name, dict) for name, folder in names.items()}
    base = BaseModel("sd", "x", ASSETS, parts, config["scheduler"], ASSETS, {}, "epsilon", "x")
    family = StableDiffusion(base)
    family.components["denoiser"] = new_unet(config["unet"])
    family.components["text_encoder"] = new_text_encoder(config["text_encoder"])
    return family


def _targets(target: AdapterTargets, pattern: re.Pattern[str]) -> dict[str, nn.Module]:
    return {path: module for path, module in target.root.named_modules() if pattern.fullmatch(path)}


def test_the_true_architectures_have_kohyas_targets(true_size: StableDiffusion) -> None:
    unet, text = true_size.adapter_targets()
    v2 = true_size.base_model_version == "sd_v2"
    assert true_size.expected_modules() == {"unet": 192, "text_encoder": 138 if v2 else 72}
    assert true_size.expected_modules(conv=True) == {"unet": 278, "text_encoder": 138 if v2 else 72}
    linear, conv = _targets(unet, unet.linear), _targets(unet, unet.conv)
    assert len(linear) == 192
    assert len(conv) == 86
    assert len(_targets(text, text.linear)) == (138 if v2 else 72)
    assert not _targets(text, text.conv)
    wide = [m for m in conv.values() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(wide) == 50
    for module in [*linear.values(), *_targets(text, text.linear).values()]:
        assert isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
    # all Linear layers and 1 × 1 convolutions of the attention blocks, by class: what kohya goes by
    blocks = {n: m for n, m in unet.root.named_modules() if type(m).__name__ == "Transformer2DModel"}
    by_class = {
        f"{name}.{inner}"
        for name, block in blocks.items()
        for inner, m in block.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    }
    assert linear.keys() == by_class


def test_names_are_those_of_kohyas_files(true_size: StableDiffusion) -> None:
    unet, text = true_size.adapter_targets()

    def keys(target: AdapterTargets, pattern: re.Pattern[str]) -> set[str]:
        return {f"{target.prefix}_{target.name(path)}".replace(".", "_") for path in _targets(target, pattern)}

    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_2",
        "lora_unet_down_blocks_2_attentions_1_proj_in",
        "lora_unet_down_blocks_2_attentions_1_proj_out",
    } <= keys(unet, unet.linear)
    assert {
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_mid_block_resnets_1_time_emb_proj",
        "lora_unet_up_blocks_0_resnets_2_conv_shortcut",
        "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    } <= keys(unet, unet.conv)
    last = 22 if true_size.base_model_version == "sd_v2" else 11
    assert {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        f"lora_te_text_model_encoder_layers_{last}_self_attn_out_proj",
        f"lora_te_text_model_encoder_layers_{last}_mlp_fc2",
    } <= keys(text, text.linear)


def test_a_module_that_goes_missing_is_noticed(true_size: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    block = true_size.components["denoiser"].get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn1")
    renamed = {("to_query" if name == "to_q" else name): module for name, module in block._modules.items()}
    monkeypatch.setattr(block, "_modules", renamed)
    with pytest.raises(AssertionError, match="191 targets in unet, where this architecture has 192"):
        true_size.adapter_targets()


def test_third_party_modules_see_kohyas_paths() -> None:
    family = _load(_open())
    view, _ = family.third_party_views()
    paths = [path for path, _ in view.named_modules()][1:]
    assert all(path.startswith("text_model") for path in paths)
    assert "text_model.encoder.layers.0.self_attn.q_proj" in paths
    encoder = family.components["text_encoder"]
    assert view.text_model is encoder
    ids = torch.randint(0, 40000, (1, 77))
    assert torch.equal(view(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_third_party_modules_see_the_unet_with_its_own_paths() -> None:
    family = _load(_open())
    unet, (_, view) = family.components["denoiser"], family.third_party_views()
    named, shown = dict(unet.named_modules()), dict(view.named_modules())
    assert named.keys() == shown.keys()
    differing = [path for path in named if named[path] is not shown[path]]
    assert differing == ["", "time_embedding"]
    assert (view.dtype, view.config) == (unet.dtype, unet.config)
    assert len(list(view.parameters())) == len(list(unet.parameters()))
    with pytest.raises(AttributeError):
        _ = view.no_such_thing
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 77, unet.config.cross_attention_dim)
    assert torch.equal(view(*inputs).sample, unet(*inputs).sample)


def test_lycoris_finds_its_targets_and_takes_effect() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    family = _load(_open())
    view, unet = family.third_party_views()
    network = lycoris.create_network(1.0, 4, 1, family.components["vae"], view, unet, algo="lora", preset="attn-mlp")
    names = {module.lora_name for module in network.text_encoder_loras}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert len(names) == 18
    before = family.encode_prompts(["a cat"])["hidden_states"].detach()
    network.apply_to(view, unet, True, True)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)
    assert not torch.allclose(family.encode_prompts(["a cat"])["hidden_states"], before, atol=1e-3)


def test_the_sampling_pipeline_draws_with_the_loaded_parts() -> None:
    family = _load(_open())
    pipeline = family.pipeline()
    assert pipeline.unet is family.components["denoiser"]
    assert pipeline.vae is family.components["vae"]
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    pipeline.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 2, "width": 64, "height": 32, "output_type": "np"}
    image = pipeline("a cat", generator=torch.Generator().manual_seed(0), **draw).images[0]
    assert image.shape == (32, 64, 3)
    assert 0.02 < image.std() < 0.5


def test_the_pipeline_predicts_velocity_where_the_model_does(tiny_v2: Path) -> None:
    pipeline = _load(_open(tiny_v2)).pipeline()
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.pad_token_id == 0  # the folder has none of its own: the shipped one serves


@pytest.mark.parametrize("name", ["sd1.ckpt", "sd2.safetensors"])
def test_a_checkpoints_own_vae_can_be_replaced(
    family: Make, tiny_files: dict[str, Path], tiny_v2: Path, name: str
) -> None:
    """By that of the other model: the factor, the scaling and the encoder are the other's."""
    other = tiny_v2 if name.startswith("sd1") else BASE
    config = configuration(BASE if name.startswith("sd1") else tiny_v2, like=name[:3])
    made = family(open_file(name, tiny_files[name], kind="sd", config=config), vae=str(other))
    reference = _open(other)
    assert (made.latents.factor, made.vae_path) == (reference.latents.factor, str(other))
    made.components.load("vae", torch.float32, "cpu")
    reference.components.load("vae", torch.float32, "cpu")
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(made.encode_images(pixels)[0], reference.encode_images(pixels)[0])


def test_open_base_model_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("library.models.checkpoints.folder.read_index", refuse)
    assert open_base_model(str(BASE)).kind == "sd"
