"""The family "sdxl": against diffusers' own loading and encoding, its conditions, its targets at true size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import sdxl_file, weights_of
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.models.checkpoints.base_model import ASSETS, BaseModel, Part
from library.models.checkpoints.single_file import open_file
from library.models.modules import new_projected_text_encoder, new_text_encoder, new_unet
from library.models.opening import open_family
from library.models.stable_diffusion_xl import StableDiffusionXL
from tests.rounding import BOUND
from tests.tiny_sdxl import configuration

CAPTIONS = ["a cat", "a dog, at night"]
SIZES: dict[str, Any] = {
    "original_sizes": [(200, 100), (64, 65)],
    "crops": [(3, 0), (0, 8)],
    "target_size": (96, 64),
}


def _open(path: Path, **options: Any) -> StableDiffusionXL:
    family = open_family(str(path), vae=options.pop("vae", None), options=options)
    assert isinstance(family, StableDiffusionXL)
    return family


def _load(family: StableDiffusionXL, dtype: torch.dtype = torch.float32) -> StableDiffusionXL:
    family.components.load("vae", dtype, "cpu")
    family.components.load_all(family.components.text_encoders, dtype, "cpu")
    family.components.load("denoiser", dtype, "cpu")
    return family


def _outputs(family: StableDiffusionXL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 64, 96, generator=generator) * 2 - 1
    noisy = torch.randn(2, 4, 8, 12, generator=generator)
    with torch.no_grad():
        condition = family.condition(family.encode_prompts(CAPTIONS), **SIZES)
        mean, std = family.encode_images(pixels)
        return {
            "mean": mean,
            "std": std,
            **condition,
            "answer": family.predict(noisy, torch.tensor([3, 998]), condition),
        }


def _assert_alike(found: StableDiffusionXL, expected: StableDiffusionXL, dtype: torch.dtype) -> None:
    """The weights to the bit, the outputs but for rounding."""
    for ours, theirs in zip(_modules(found), _modules(expected), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(_outputs(found), _outputs(expected), rtol=0, atol=BOUND[dtype])


def _modules(family: StableDiffusionXL) -> list[nn.Module]:
    return family.components.loaded()


@pytest.fixture(scope="module")
def states(tiny_sdxl: Path) -> dict[str, torch.Tensor]:
    """The tiny model as one file holds it."""
    weights = weights_of(tiny_sdxl)
    parts = (weights[name] for name in ("unet", "vae", "text", "text_2"))
    return {name: tensor.contiguous() for name, tensor in sdxl_file(*parts, configuration()).items()}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, states: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("sdxl") / "model.safetensors"
    save_file(states, path)
    return path


def _from_file(path: Path, **options: Any) -> StableDiffusionXL:
    base = open_file(str(path), path, kind="sdxl", config=configuration())
    return StableDiffusionXL(base, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_gives_exactly_what_the_folder_gives(
    tiny_sdxl: Path, tiny_file: Path, dtype: torch.dtype
) -> None:
    _assert_alike(_load(_from_file(tiny_file), dtype), _load(_open(tiny_sdxl), dtype), dtype)


def test_a_file_in_half_precision_is_mapped_and_not_copied(
    tmp_path: Path, states: dict[str, torch.Tensor], tiny_sdxl: Path
) -> None:
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in states.items()}, path)
    family = _load(_from_file(path), torch.float16)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    assert maps
    _assert_alike(family, _load(_open(tiny_sdxl), torch.float16), torch.float16)


def test_diffusers_reads_the_same_from_the_file(tiny_sdxl: Path, tiny_file: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(tiny_file), config=str(tiny_sdxl), local_files_only=True, dtype=torch.float32
    )
    family = _load(_from_file(tiny_file))
    theirs = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    for found, expected in zip(_modules(family), theirs, strict=True):
        assert type(found) is type(expected)
        states = expected.state_dict()
        assert found.state_dict().keys() == states.keys()
        assert all(torch.equal(tensor, states[name]) for name, tensor in found.state_dict().items())
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        texts = family.encode_prompts(CAPTIONS)
        torch.testing.assert_close(texts["hidden_states"], prompt, rtol=0, atol=BOUND[torch.float32])
        torch.testing.assert_close(texts["pooled"], pooled, rtol=0, atol=BOUND[torch.float32])
        noisy, t = torch.randn(2, 4, 8, 12), torch.tensor([3, 998])
        ids = torch.tensor([[100, 200, 0, 3, 64, 96], [65, 64, 8, 0, 64, 96]])
        added = {"text_embeds": pooled, "time_ids": ids}
        expected = pipeline.unet(noisy, t, prompt, added_cond_kwargs=added).sample
        # torch.matmul goes another way where weights take gradients, as diffusers loads them
        answer = family.predict(noisy, t, family.condition(texts, **SIZES))
        torch.testing.assert_close(answer, expected, rtol=0, atol=BOUND[torch.float32])


def test_the_sizes_matter_and_keep_their_digits(tiny_sdxl: Path) -> None:
    """bf16 has no 1437; the embedding of a size is made from the whole number."""
    family = _load(_open(tiny_sdxl), torch.bfloat16)
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        texts = family.encode_prompts(["a cat"])

        def answer(width: int) -> torch.Tensor:
            sizes: dict[str, Any] = {"original_sizes": [(width, 900)], "crops": [(0, 0)], "target_size": (64, 64)}
            condition = family.condition(texts, **sizes)
            assert not condition["time_ids"].is_floating_point()
            return family.predict(noisy, t, condition)

        assert not torch.equal(answer(1437), answer(1438))
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(answer(1437), answer(1438))


def test_long_prompts_are_kohyas(tiny_sdxl: Path) -> None:
    """Chunks of 75 joined between the first BOS and the last end; the summary is the first chunk's."""
    words = " ".join(f"word{i}" for i in range(90))
    long, short = _load(_open(tiny_sdxl, max_token_length=225)), _load(_open(tiny_sdxl))
    with torch.no_grad():
        texts, first = long.encode_prompts([words, "a cat"]), short.encode_prompts([words, "a cat"])
    assert texts["hidden_states"].shape == (2, 227, 72)
    # six chunks in a batch instead of two
    bound = BOUND[torch.float32]
    torch.testing.assert_close(texts["hidden_states"][:, :76], first["hidden_states"][:, :76], rtol=0, atol=bound)
    assert (texts["hidden_states"][0, 76:151] - texts["hidden_states"][1, 76:151]).abs().max() > 0.1
    torch.testing.assert_close(texts["pooled"], first["pooled"], rtol=0, atol=bound)


def test_weights_of_words_change_the_states_and_not_the_summary(tiny_sdxl: Path) -> None:
    with torch.no_grad():
        plain = _load(_open(tiny_sdxl)).encode_prompts(["a cat"])
        weighted = _load(_open(tiny_sdxl, weighted_captions=True)).encode_prompts(["a (cat:1.5)"])
    factor = torch.ones(77, 1)
    factor[2] = 1.5
    torch.testing.assert_close(weighted["hidden_states"][0], plain["hidden_states"][0] * factor)
    assert torch.equal(weighted["pooled"], plain["pooled"])


def test_what_the_model_says_of_itself(
    tmp_path: Path, states: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "model.safetensors"
    save_file(states, path)
    family = _from_file(path, clip_skip=2)
    assert (family.base_model_version, family.architecture) == ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
    assert (family.process.prediction_type, family.clip_skip) == ("epsilon", None)
    assert "--clip_skip 2: has no effect" in caplog.text
    assert family.latents.overflows_fp16
    with pytest.raises(UserError, match=r"--v2 was given, but .* is an SDXL model"):
        _from_file(path, v2=True)
    with pytest.raises(UserError, match=r"--zero_terminal_snr: .* predicts noise"):
        _from_file(path, zero_terminal_snr=True)
    assert _from_file(path, v_parameterization=True, zero_terminal_snr=True).process.alphas_cumprod[-1] == 0
    save_file({**states, "v_pred": torch.zeros(0)}, path)
    assert _from_file(path).process.prediction_type == "v_prediction"
    assert _from_file(path).process.alphas_cumprod[-1] > 0
    save_file({**states, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    family = _from_file(path)
    assert family.process.alphas_cumprod[-1] == 0
    # the schedule's mark alone: the user says the rest, or is asked to
    save_file({**states, "ztsnr": torch.zeros(0)}, path)
    assert _from_file(path, v_parameterization=True).process.alphas_cumprod[-1] == 0
    assert "if it predicts v, give --v_parameterization" not in caplog.text
    assert _from_file(path).process.alphas_cumprod[-1] > 0
    assert "if it predicts v, give --v_parameterization" in caplog.text
    assert "of no known part" not in caplog.text


def test_a_folder_says_what_it_predicts(tmp_path: Path, tiny_sdxl: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    path = folder / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    family = _open(folder)
    assert family.process.prediction_type == "v_prediction"
    assert family.process.alphas_cumprod[-1] == 0
    shutil.rmtree(folder / "tokenizer")
    assert _open(folder).count_tokens("a photo of a cat") == 5
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"cross_attention_dim": 64}))
    with pytest.raises(UserError, match="needs text states of 64 channels, the text encoders return 32 and 40"):
        _open(folder)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            r"another kind \(EDMEulerScheduler\)",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "another kind"),
        ("vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [5.0] * 4}, "scales each channel by itself"),
    ],
)
def test_folders_of_relatives_are_refused(
    tmp_path: Path, tiny_sdxl: Path, part: str, change: dict[str, Any], said: str
) -> None:
    path = Path(shutil.copytree(tiny_sdxl, tmp_path / "model")) / part
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        _open(tmp_path / "model")


def test_another_vae_from_a_file_of_its_own(tmp_path: Path, tiny_sdxl: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    shutil.move(folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "fixed.safetensors")
    family = _open(folder, vae=str(tmp_path / "fixed.safetensors"))
    family.components.load("vae", torch.float32, "cpu")
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(family.encode_images(pixels)[0], _load(_open(tiny_sdxl)).encode_images(pixels)[0])


def test_the_pipeline_draws_what_diffusers_own_would(tiny_sdxl: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    ours = _load(_open(tiny_sdxl)).pipeline()
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, add_watermarker=False)
    theirs.scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    images = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "width": 96, "height": 64, "output_type": "pt"}
        # diffusers has zeros for an empty negative prompt, kohya and we its encoding
        images.append(pipeline("a cat", negative_prompt="a dog", generator=generator, **options).images[0])
    torch.testing.assert_close(*images, rtol=0, atol=BOUND[torch.float32])


@pytest.fixture(scope="module")
def true_size() -> StableDiffusionXL:
    """The true architecture, without weights."""
    config = json.loads((ASSETS / "sdxl.json").read_text())
    names = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    parts = {name: Part(config[folder], name, dict) for name, folder in names.items()}
    base = BaseModel("sdxl", "x", ASSETS, parts, config["scheduler"], ASSETS, {}, "epsilon", "x")
    family = StableDiffusionXL(base)
    family.components["denoiser"] = new_unet(config["unet"])
    family.components["text_encoder"] = new_text_encoder(config["text_encoder"])
    family.components["text_encoder_2"] = new_projected_text_encoder(config["text_encoder_2"])
    return family


def test_the_true_architecture_has_kohyas_targets(true_size: StableDiffusionXL) -> None:
    assert true_size.expected_modules() == {"unet": 722, "text_encoder_1": 72, "text_encoder_2": 192}
    assert true_size.components["denoiser"] is not None
    assert sum(parameter.numel() for parameter in true_size.components["denoiser"].parameters()) == 2_567_463_684
    unet, first, second = true_size.adapter_targets()
    assert (unet.prefix, first.prefix, second.prefix) == ("lora_unet", "lora_te1", "lora_te2")
    # all Linear layers and 1 × 1 convolutions of the attention blocks, by class: what kohya goes by
    blocks = {n: m for n, m in unet.root.named_modules() if type(m).__name__ == "Transformer2DModel"}
    by_class = {
        f"{name}.{inner}"
        for name, block in blocks.items()
        for inner, m in block.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    }
    assert {path for path, _ in unet.root.named_modules() if unet.linear.fullmatch(path)} == by_class
    convolutions = [m for path, m in unet.root.named_modules() if unet.conv.fullmatch(path)]
    wide = [m for m in convolutions if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert (len(convolutions), len(wide)) == (66, 38)


def test_a_module_that_goes_missing_is_noticed(true_size: StableDiffusionXL, monkeypatch: pytest.MonkeyPatch) -> None:
    block = true_size.components["text_encoder_2"].get_submodule("text_model.encoder.layers.31.mlp")
    renamed = {("first" if name == "fc1" else name): module for name, module in block._modules.items()}
    monkeypatch.setattr(block, "_modules", renamed)
    with pytest.raises(AssertionError, match="191 targets in text_encoder_2, where this architecture has 192"):
        true_size.adapter_targets()
