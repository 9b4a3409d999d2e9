"""Samples drawn during training: files, samplers, and that training does not notice them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.config.samplers import SAMPLERS
from library.diffusion.ddpm import DDPM
from library.models.opening import open_family
from library.sampling.files import Sample, draw_over_time
from library.sampling.prompts import SamplePrompt, SampleTimes
from library.sampling.render import EncodedPrompts, Sampling, _save_grid, render
from library.training.hooks.pictures import Pictures
from tests.conftest import BASE
from tests.quick import quick

PROMPTS = "emoji of cat --w 64 --h 64 --s 2 --d 5\nemoji of dog --n cat --w 72 --h 64 --s 2 --ss euler_a\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def drawn(folder: Path) -> list[str]:
    """The samples' names, without the time in them."""
    return sorted(re.sub(r"_\d{14}", "_T", path.name) for path in (folder / "out" / "sample").glob("*_*_0?_*.png"))


def test_training_does_not_notice_samples(train, tmp_path, prompts):
    common = ("--network_dropout", "0.2", "--max_train_steps", "3")
    assert train("--output_name", "without", *common) == 0
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--sample_at_first")
    assert train("--output_name", "with", *common, *words) == 0
    without, with_ = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("without", "with"))
    assert without.keys() == with_.keys()
    assert all(torch.equal(without[key], with_[key]) for key in without)
    moments = ("000002", "e000000")
    assert drawn(tmp_path) == [f"with_{moment}_{name}" for moment in moments for name in ("00_T_5.png", "01_T.png")]
    folder = tmp_path / "out" / "sample"
    sizes = {path.name.split("_")[2]: np.asarray(Image.open(path)).shape[:2] for path in folder.glob("*_0?_*.png")}
    assert sizes == {"00": (64, 64), "01": (64, 72)}
    over_time = np.asarray(Image.open(folder / "with_over_time_01.png"))  # both moments, side by side
    (first,), (second,) = folder.glob("with_e000000_01_*.png"), folder.glob("with_000002_01_*.png")
    for path, left in ((first, 8), (second, 104)):
        assert (over_time[26 : 26 + 64, left : left + 72] == np.asarray(Image.open(path).convert("RGB"))).all()


@pytest.mark.slow
def test_samples_follow_the_steps_of_a_schedule_free_optimizer_with_all_caches(train, tmp_path, prompts):
    """Text encoder and VAE are gone then; the weights that are drawn with are those that are saved."""
    pytest.importorskip("schedulefree")
    words = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--mixed_precision", "bf16")
    cached = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--no_half_vae")
    optimizer = ("--optimizer_type", "AdamWScheduleFree", "--max_train_steps", "3")
    assert train(*words, *cached, *optimizer) == 0
    assert drawn(tmp_path) == ["test_000002_00_T_5.png", "test_000002_01_T.png"]


@pytest.fixture(scope="module")
def family():
    family = open_family(str(BASE))
    family.components.load("vae", torch.float32, "cpu")
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    family.components.load("denoiser", torch.float32, "cpu")
    return family


def picture(family, sampler: str, *, steps: int = 6, seed: int = 3) -> torch.Tensor:
    item = SamplePrompt(prompt="emoji of grinning cat", width=64, height=64, sample_steps=steps, scale=3.0)
    encode = EncodedPrompts(family, [item.prompt, ""])
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    state = torch.get_rng_state()
    image = render(family, pipeline, encode, item, sampler=sampler, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"  # the next one starts from the model's own
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()


@pytest.mark.parametrize("sampler", quick(SAMPLERS, "ddim", "euler", "euler_a", "dpmsolver++", "lms"))
def test_every_sampler_draws_much_the_same_picture(family, sampler):
    """From one noise, all solve one equation: near to DDIM with many steps, and far from noise."""
    if sampler == "lms":
        pytest.importorskip("scipy")
    found = picture(family, sampler, steps=7)
    spread = found.std()
    assert 20 < spread < 120, "neither flat nor noise at full contrast"
    if not sampler.endswith("_a"):  # these add noise of their own
        exact = _exact(family)
        error = (found - exact).square().mean().sqrt() / (exact - exact.mean()).square().mean().sqrt()
        assert error < 0.6, f"{sampler}: {error:.2f}"


_pictures: dict[str, torch.Tensor] = {}


def _exact(family) -> torch.Tensor:
    if "exact" not in _pictures:
        _pictures["exact"] = picture(family, "ddim", steps=20)
    return _pictures["exact"]


def test_schedulers_have_the_models_noise_schedule_and_prediction(family):
    process = DDPM("v_prediction", family.process.alphas_cumprod, {**family.process.settings, "beta_end": 0.015})
    for sampler in SAMPLERS:
        if sampler == "lms":
            pytest.importorskip("scipy")
        scheduler = process.scheduler(sampler)
        assert (scheduler.config.prediction_type, scheduler.config.beta_end) == ("v_prediction", 0.015), sampler


def test_the_network_samples_without_dropout_and_trains_on_with_it(family, tmp_path):
    network, shown, modes = torch.nn.Dropout(0.5), [], []
    family.components.release("vae")

    def show(name, image, *, caption, step) -> None:
        modes.append(network.training)
        shown.append((name, caption, step, image.size))

    item, strengths = SamplePrompt(prompt="emoji of cat", width=64, height=64, sample_steps=1, multiplier=-1.5), []

    @contextmanager
    def at(multiplier: float) -> Iterator[None]:
        strengths.append(multiplier)
        yield

    sampling = Sampling(
        times=SampleTimes(prompts=(item,), sampler="ddim", at_first=False, every_n_steps=2, every_n_epochs=None),
        family=family, network=network, at=at, encode=EncodedPrompts(family, []), folder=tmp_path, name=None, seed=1,
        vae_dtype=torch.float32, autocast=torch.no_grad, show=show, steps_per_epoch=5, since=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    for step in range(4):
        sampling(step)
    assert shown == [("sample_0", "emoji of cat", 2, (64, 64))]
    assert modes == [False]
    assert strengths == [-1.5]
    assert network.training
    assert "vae" not in family.components
    names = sorted(re.sub(r"\d{14}", "T", path.name) for path in tmp_path.iterdir())
    assert names == ["000002_00_T.png", "last_over_time_00.png"]


def test_any_prompt_can_stand_in_a_picture(tmp_path):
    """Files of prompts can have lines in them, and "$_$" would be a formula."""
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "one.png")
    draw_over_time(tmp_path / "lines.png", [Sample(tmp_path / "one.png", "step 1", 1, 0)], prompt="a fox\n\nin snow")
    draw_over_time(tmp_path / "line.png", [Sample(tmp_path / "one.png", "step 1", 1, 0)], prompt="a fox in snow")
    assert (tmp_path / "lines.png").read_bytes() == (tmp_path / "line.png").read_bytes()
    _save_grid(tmp_path / "grid.png", ["a fox, $_$"], [("$_$", [image])])
    assert (tmp_path / "grid.png").is_file()


def test_the_pictures_of_a_finished_run_are_drawn_without_dropout(tmp_path, monkeypatch):
    network, seen = torch.nn.Module(), []
    network.off = network.at = nullcontext
    monkeypatch.setattr("library.sampling.render.compare", lambda *_, **__: seen.append(network.training))
    family = SimpleNamespace(components={"vae": None})
    run = SimpleNamespace(network=network, family=family, weights_for=nullcontext, seed=0)
    paths = {"compare": tmp_path / "compare.png"}
    made = Pictures(paths, encode=None, vae_dtype=torch.float32, prompts=["a fox"], size=(64, 64), steps=1)
    made.end(run, stopped_by="", conclusion="")
    assert (seen, network.training) == ([False], True)
