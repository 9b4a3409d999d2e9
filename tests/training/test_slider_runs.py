"""Runs without images: a slider's loss beside a plain implementation, files, states, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library import rng
from library.config.data.slider_prompts import Setting, read_settings
from tests import tiny_sd2
from tests.conftest import BASE, forget_accelerator
from tests.quick import quick
from tests.training.test_resume import stop_after
from tests.training.written import metadata, same, weights

AXIS = """
resolution = 64
batch_size = 2
guidance_scale = 1.5

[[targets]]
target_class = "emoji of heart"
positive = "emoji of red heart"
negative = "emoji of blue heart"
neutral = "emoji of heart"
weight = 0.5
"""
Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """train_leco.py's main on `AXIS` for two steps, into `out`; the words come last, so they win."""
    from train_leco import main

    prompts = tmp_path / "prompts.toml"
    prompts.write_text(AXIS, encoding="utf-8")
    words = ["--pretrained_model_name_or_path", str(BASE), "--prompts_file", str(prompts)]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--learning_rate", "1e-3"]
    words += ["--max_train_steps", "2", "--max_denoising_steps", "4", "--seed", "1"]
    words += ["--no-slider_picture", "--no-loss_plot", "--no-report"]
    return lambda *more: main([*words, *more])


def steps(folder: Path, name: str = "test") -> list[dict[str, Any]]:
    lines = (folder / "out" / f"{name}-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for text in lines if "loss" in (line := json.loads(text))]


# -- a plain implementation, with diffusers and torch alone


def trained_lora(path: Path, shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA whose ups are not zero, so that the multiplier matters."""
    drawn = torch.Generator().manual_seed(5)
    ups = {key for key in shapes if key.endswith("lora_up.weight")}
    lora = {key: torch.randn(t.shape, generator=drawn) * 0.1 if key in ups else t for key, t in shapes.items()}
    save_file(lora, path)
    return lora


def unet_with(lora: dict[str, torch.Tensor], multiplier: float) -> Any:
    """diffusers' UNet of the base with the LoRA added to its weights."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet").float()  # its file is in fp16
    layers = {f"lora_unet_{path}".replace(".", "_"): layer for path, layer in unet.named_modules()}
    for name in {key.partition(".")[0] for key in lora}:
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        delta = up.flatten(1) @ down.flatten(1) * lora[f"{name}.alpha"] / len(down)
        weight = layers[name].weight
        weight.data += multiplier * delta.view(weight.shape)
    return unet


@torch.no_grad()
def states_of(texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """The text encoder's last states of each text."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder").float()

    def encoded(text: str) -> torch.Tensor:
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return encoder(ids).last_hidden_state

    return {text: encoded(text).expand(2, -1, -1) for text in texts}


@torch.no_grad()
def plain_loss(
    setting: Setting, key: tuple[int, str], unets: dict[float, Any], states: dict[str, torch.Tensor], *, predicts: str
) -> float:
    """The loss of a batch of two, with four denoising steps and a guidance of 2.5. `key`: (first repeat, the setting's
    key) of its draws in epoch 0, seed 1. unets: with the LoRA at each multiplier."""
    from diffusers import DDIMScheduler

    (repeat, name), total = key, 4
    settings = {"prediction_type": predicts, "timestep_spacing": "trailing", "set_alpha_to_one": False}
    scheduler = DDIMScheduler.from_pretrained(BASE, subfolder="scheduler", **settings)
    scheduler.set_timesteps(total)
    trained, base = unets[setting.multiplier], unets[0]
    noises = [torch.randn(4, 16, 16, generator=rng.torch_generator(1, 0, repeat + i, name, "noise")) for i in range(2)]
    latents = torch.stack(noises)
    count = rng.python_random(1, 0, repeat, name, "denoising steps").randrange(1, total)
    for t in scheduler.timesteps[:count]:
        plain = trained(latents, t, states[setting.unconditional]).sample
        aimed = trained(latents, t, states[setting.target]).sample
        latents = scheduler.step(plain + 2.5 * (aimed - plain), t, latents).prev_sample
    t = 999 - int(count * 1000 / total)
    of = {text: base(latents, t, states[text]).sample for text in setting.prompts}
    moved = setting.guidance_scale * (of[setting.positive] - of[setting.unconditional])
    target = of[setting.neutral] + (moved if setting.action == "enhance" else -moved)
    found = trained(latents, t, states[setting.target]).sample
    return setting.weight * float((found - target).square().mean())


@pytest.fixture
def lora(train: Train, tmp_path: Path) -> dict[str, torch.Tensor]:
    assert train("--max_train_steps", "1", "--output_name", "shapes", "--no-monitoring") == 0
    forget_accelerator()
    return trained_lora(tmp_path / "lora.safetensors", weights(tmp_path, "shapes"))


@pytest.mark.parametrize("predicts", quick(["epsilon", "v_prediction"], "epsilon"))
def test_the_losses_are_those_of_a_plain_implementation(
    predicts: str, train: Train, lora: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Of the first steps with each direction, in fp32: the sums have other orders."""
    words = ["--network_weights", str(tmp_path / "lora.safetensors"), "--learning_rate", "1e-12"]
    words += ["--v_parameterization"] if predicts == "v_prediction" else []
    assert train(*words, "--max_train_steps", "4", "--leco_denoise_guidance_scale", "2.5") == 0
    from library.config.parser import parse
    from library.data.sources.prompts import PromptData
    from library.run.plan import make_plan

    settings = read_settings(tmp_path / "prompts.toml")
    options = ["--pretrained_model_name_or_path", str(BASE), "--prompts_file", str(tmp_path / "prompts.toml")]
    plan = make_plan(parse([*options, "--output_dir", str(tmp_path / "none"), "--seed", "1"]))
    data = PromptData(plan.prepared, settings, seed=1, batches_per_step=1, total_steps=4)
    planned = [(batch[0][0], batch[0][1]) for batch in data.plan(0)[:4]]
    assert sorted(number for number, _ in planned) == [0, 1, 2, 3]
    unets = {multiplier: unet_with(lora, multiplier) for multiplier in (-1, 0, 1)}
    states = states_of(data.captions())
    expected = [
        plain_loss(settings[n], (repeat, plan.prepared.samples[n].key), unets, states, predicts=predicts)
        for n, repeat in planned
    ]
    assert [line["loss"] for line in steps(tmp_path)] == pytest.approx(expected, rel=1e-4)


def test_a_slider_and_all_its_files(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file, kohya's metadata, the picture, samples at several multipliers, the summary and the report."""
    (tmp_path / "samples.txt").write_text(
        "".join(f"emoji of heart --w 64 --h 64 --s 2 --d 1 --am {am}\n" for am in (-1, 0, 1)), encoding="utf-8"
    )
    words = ("--slider_picture", "--sample_prompts", str(tmp_path / "samples.txt"), "--sample_every_n_steps", "2")
    assert train(*words, "--compare_steps", "2", "--report", "--learning_rate", "1e-2") == 0
    tensors = weights(tmp_path)
    assert {key.partition(".")[0].rpartition("_")[0][:9] for key in tensors} == {"lora_unet"}
    facts = metadata(tmp_path)
    assert (facts["ss_leco_prompt_count"], facts["ss_leco_prompts_file"]) == ("4", "prompts.toml")
    first = json.loads(facts["ss_leco_preview"])[0]
    assert first == {
        "target": "emoji of heart", "positive": "emoji of blue heart", "unconditional": "emoji of red heart",
        "neutral": "emoji of heart", "action": "erase", "multiplier": 1.0, "weight": 0.5,
    }  # fmt: skip
    assert facts["ss_num_train_images"] == "0"
    said = capsys.readouterr().err
    assert (
        "'emoji of heart' at +1: 'emoji of heart' - 1.5 · ('emoji of blue heart' - 'emoji of red heart'); 64 × 64, "
        "batch 2, weight 0.5"
    ) in said
    left, plain, right = sorted((tmp_path / "out" / "sample").glob("test_000002_*"))
    assert len({path.read_bytes() for path in (left, plain, right)}) == 3
    with Image.open(tmp_path / "out" / "test-slider.png") as picture:
        assert picture.width > 3 * picture.height  # one prompt at five multipliers
    assert "emoji of blue heart" in (tmp_path / "out" / "test-report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--gradient_accumulation_steps 2 --noise_offset 0.1 --ema_decay 0.9"])
def test_a_resumed_slider_has_the_bits_of_an_unbroken_one(
    more: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max_train_steps", "3", "--gradient_checkpointing", "--network_dropout", "0.2", *more.split())
    assert train(*words, "--output_name", "whole") == 0
    forget_accelerator()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train(*words, "--output_name", "broken") == 130
    forget_accelerator()
    assert train(*words, "--output_name", "broken", "--resume", "latest") == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "broken"))
    assert [line["loss"] for line in steps(tmp_path, "whole")] == [line["loss"] for line in steps(tmp_path, "broken")]


@pytest.mark.slow
def test_checkpoints_are_computed_again_at_the_batchs_multiplier(train: Train, tmp_path: Path) -> None:
    """Up to the order of sums: at another multiplier the gradient of lora_down would have another sign."""
    for name, words in (("plain", ()), ("checkpoints", ("--gradient_checkpointing",))):
        assert train(*words, "--output_name", name, "--optimizer_type", "SGD", "--learning_rate", "10") == 0
        forget_accelerator()
    plain, again = (weights(tmp_path, name) for name in ("plain", "checkpoints"))
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_other_prompts_are_another_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--save_every_n_steps", "1", "--save_state") == 0
    forget_accelerator()
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(AXIS.replace("guidance_scale = 1.5", "guidance_scale = 2.5"), encoding="utf-8")
    assert train("--resume", str(tmp_path / "out" / "test-step00000001-state")) == 2
    assert "the data:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_moved_prompts_file_is_the_same_run(train: Train, tmp_path: Path) -> None:
    assert train("--save_every_n_steps", "1", "--save_state") == 0
    forget_accelerator()
    shutil.move(tmp_path / "prompts.toml", tmp_path / "moved.toml")
    state = str(tmp_path / "out" / "test-step00000001-state")
    words = ("--resume", state, "--prompts_file", str(tmp_path / "moved.toml"), "--output_name", "again")
    assert train(*words) == 0
    assert same(weights(tmp_path), weights(tmp_path, "again"))


@pytest.mark.parametrize("words", quick(["", "--gradient_checkpointing --mixed_precision bf16 --noise_offset 0.1"], ""))
def test_sdxl(words: str, tiny_sdxl: Path, train: Train, tmp_path: Path) -> None:
    from sdxl_train_leco import main

    prompts = tmp_path / "prompts.toml"
    prompts.write_text(AXIS.replace("weight = 0.5", "dynamic_crops = true"), encoding="utf-8")
    given = [
        "--pretrained_model_name_or_path",
        str(tiny_sdxl),
        "--prompts_file",
        str(prompts),
        "--max_train_steps",
        "2",
    ]
    given += [
        "--output_dir",
        str(tmp_path / "out"),
        "--output_name",
        "test",
        "--max_denoising_steps",
        "3",
        "--seed",
        "1",
    ]
    assert (
        main([*given, "--compare_steps", "1", "--no-report", "--no-loss_plot", "--min_snr_gamma", "5", *words.split()])
        == 0
    )
    tensors = weights(tmp_path)
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    assert metadata(tmp_path)["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (tmp_path / "out" / "test-slider.png").exists()


@pytest.mark.slow
def test_stable_diffusion_2(train: Train, tmp_path: Path) -> None:
    """Velocity, Linear projections, another text encoder."""
    base = str(tiny_sd2.write(tmp_path / "base"))
    assert train("--pretrained_model_name_or_path", base, "--v2", "--v_parameterization", "--zero_terminal_snr") == 0
    assert metadata(tmp_path)["ss_base_model_version"] == "sd_v2_v"
    assert any(tensor.any() for key, tensor in weights(tmp_path).items() if key.endswith("lora_up.weight"))


def test_sdxl_s_script_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdxl_train_leco import main

    (tmp_path / "prompts.toml").write_text(AXIS, encoding="utf-8")
    words = ["--pretrained_model_name_or_path", str(BASE), "--prompts_file", str(tmp_path / "prompts.toml")]
    assert main([*words, "--output_dir", str(tmp_path)]) == 2
    assert "SDXL" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--dry_run", "--dry_run=measure"])
def test_a_dry_run(how: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(how) == 0
    said = capsys.readouterr().out
    assert "prompts     3 different, 0 cut off at 75 tokens" in said
    assert bool(re.search(r"time +\d+\.\d\d s a step, measured", said)) == how.endswith("measure")
    assert "latents a step" in said
    assert not (tmp_path / "out").exists()


# -- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train_data_dir", "x"), "--train_data_dir is about images, and --prompts_file trains"),
        (("--validation_split", "0.1"), "--validation_split is about images, and --prompts_file trains without any"),
        (("--masked_loss",), "--masked_loss is about images"),
        (("--find_lr",), "--find_lr is about images"),
        (("--network_train_text_encoder_only",), "--network_train_text_encoder_only with --prompts_file: the"),
        (("--token_string", "zfox"), "--token_string with --prompts_file: a new word is learnt from images of it"),
        (("--prompts_file", "promts.toml"), "--prompts_file promts.toml: no such file"),
        (("--max_denoising_steps", "1"), "--max_denoising_steps: must be at least 2"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(
    words: tuple[str, ...], message: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_about_images_are_said_to_be_idle(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--resolution", "512", "--cache_latents_to_disk", "--shuffle_caption", "--min_timestep", "100")
    assert train(*words, "--train_batch_size", "4", "--text_encoder_lr", "1e-4", "--max_train_steps", "1") == 0
    said = capsys.readouterr().err
    for name in ("resolution", "cache_latents_to_disk", "shuffle_caption", "min_timestep", "train_batch_size"):
        assert re.search(rf"--{name}( \S+)?: has no effect", said), name
    assert "--text_encoder_lr has no effect" in said
    assert not (tmp_path / ".lora_cache").exists()


def test_without_prompts_the_options_are_idle(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import run_training

    assert run_training(tmp_path, "--max_denoising_steps", "20", "--max_train_steps", "1") == 0
    assert "--max_denoising_steps: has no effect without --prompts_file" in capsys.readouterr().err


def test_the_scripts_name_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train_leco import main

    assert main(["--pretrained_model_name_or_path", str(BASE), "--output_dir", str(tmp_path)]) == 2
    assert "--prompts_file is required: train on the prompts of this TOML file" in capsys.readouterr().err


def test_a_size_that_the_model_cannot_have(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.toml").write_text(AXIS.replace("resolution = 64", "resolution = 65"), encoding="utf-8")
    assert train() == 2
    assert "target 1: resolution 65: this model's sides are multiples of" in capsys.readouterr().err


def test_noise_from_which_nothing_can_be_denoised(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = base / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "rescale_betas_zero_snr": True}), encoding="utf-8")
    assert train("--pretrained_model_name_or_path", str(base)) == 2
    assert f"--prompts_file: {base} predicts noise, and its noise schedule ends in pure" in capsys.readouterr().err


def test_one_prompt_to_erase_with_guidance_1_needs_no_second_pass(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance 1 is the target's prediction alone; the base's are one pass over the different prompts."""
    from library.models.stable_diffusion import StableDiffusion

    (tmp_path / "prompts.toml").write_text(
        '[[prompts]]\ntarget = "emoji of red heart"\nresolution = 64\nbatch_size = 3\n', encoding="utf-8"
    )
    sizes: list[tuple[int, bool]] = []
    predict = StableDiffusion.predict

    def counted(self: Any, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append((len(noisy), torch.is_grad_enabled()))
        return predict(self, noisy, *rest)

    monkeypatch.setattr(StableDiffusion, "predict", counted)
    words = ("--max_denoising_steps", "2", "--max_train_steps", "1", "--leco_denoise_guidance_scale", "1")
    assert train(*words) == 0
    assert sizes == [(3, False), (6, False), (3, True)]  # denoised once; '' and the target; the trained one
    assert load_file(tmp_path / "out" / "test.safetensors")
