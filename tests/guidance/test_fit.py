"""The verdict and --fit: what they compute, what they choose, and that the user's own settings stay."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.fields import BadValue, memory_bytes, read_fit
from library.config.parser import parse
from library.errors import UserError
from library.guidance import fit, levers, verdict
from library.guidance.card import Card, card_of
from library.quantization import FORMATS
from library.run.plan import Plan, make_plan
from tests.conftest import BASE

MIB = 2**20
Planned = Callable[..., Plan]
Train = Callable[..., int]


@pytest.fixture
def planned(tmp_path: Path, image_folder: Path) -> Planned:
    given = [
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder)),
        *("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out")),
        *("--learning_rate", "1e-4", "--seed", "1", "--network_dim", "4"),
    ]
    return lambda *words: make_plan(parse([*given, *words]))


def card(size: int) -> Card:
    return Card("a card", size, size, context=0)


@pytest.mark.parametrize(
    ("word", "size"),
    [("8GB", 8 * 2**30), ("8 gib", 8 * 2**30), ("512MiB", 512 * MIB), ("1.5GB", 3 * 2**29), ("64kb", 65536)],
)
def test_sizes_of_memory(word: str, size: int) -> None:
    assert memory_bytes(word) == size


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("8", "'8' has no unit, did you mean '8GB'?"),
        ("8GBit", "'8GBit' has an unknown unit, gbit, did you mean '8GB'?"),
        ("512mbyte", "did you mean '512MB'?"),
        ("big", "'big' is not a size of memory such as 8GB"),
        ("-8GB", "is not a size"),
        ("0GB", "is not a size"),
    ],
)
def test_wrong_sizes_of_memory(word: str, said: str) -> None:
    with pytest.raises(BadValue) as error:
        memory_bytes(word)
    assert said in str(error.value)
    assert read_fit("AUTO") == "auto"


@pytest.mark.slow
def test_the_moments_of_a_run(planned: Planned, tmp_path: Path) -> None:
    """Each part is in the moment that needs it, and nothing else."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox --w 128 --h 128\n", encoding="utf-8")
    plan = planned(
        *("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--ema_decay", "0.9"),
        *("--validation_split", "0.3", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2"),
    )
    needs = verdict.estimator(plan).needs(plan.options)
    found = {moment.name: moment.parts for moment in needs.moments}
    names = ["caching latents", "caching text", "a training step", "the optimizer's step", "validation"]
    assert list(found) == [*names, "rendering samples", "rendering samples: the VAE"]
    step = found["a training step"]
    assert "optimizer state" not in found["caching latents"]
    assert step["average"] == step["gradients"] == 4 * needs.trained
    assert step["optimizer state"] == needs.state
    assert "VAE" not in step
    assert found["rendering samples"]["VAE"] == found["caching latents"]["weights"]
    assert found["validation"]["activations"] < step["activations"]
    assert needs.largest.total == max(moment.total for moment in needs.moments)


@pytest.mark.slow
def test_checkpointing_and_small_batches_need_less(planned: Planned) -> None:
    plan = planned("--train_batch_size", "4", "--cache_latents")
    estimates = verdict.estimator(plan)
    found = {
        name: estimates.needs(levers.with_changes(plan.options, changes)).moment("a training step").parts["activations"]
        for name, changes in {
            "as it is": {},
            "checkpointing": {"gradient_checkpointing": True},
            "batch 1": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
        }.items()
    }
    assert found["checkpointing"] < 0.5 * found["as it is"]
    assert found["batch 1"] == pytest.approx(found["as it is"] / 4, rel=0.1)


def test_a_run_that_fits_is_left_alone(planned: Planned) -> None:
    plan = planned()
    assert fit.choose(plan, card(4096 * MIB)).levers == ()


@pytest.mark.slow
def test_the_fastest_combination_that_fits_is_chosen(planned: Planned) -> None:
    """No other combination that fits is faster: all are computed."""
    plan = planned("--mixed_precision", "bf16", "--optimizer_type", "AdamW", "--cache_latents")
    estimates = verdict.estimator(plan)
    now = estimates.needs(plan.options).largest.total
    small = card(int(0.85 * now / 0.95))
    choice = fit.choose(plan, small, estimates)
    assert choice.levers
    assert choice.needs.largest.total <= small.usable
    usable = [lever for lever in levers.levers(plan) if not lever.lacking]
    for other in fit._combinations(usable):
        if any(lever.is_last for lever in other) or (options := fit._with(plan, other)) is None:
            continue
        if estimates.needs(options).largest.total <= small.usable:
            assert math.prod(lever.time for lever in other) >= choice.time - 1e-9


def test_what_the_user_gave_stays(planned: Planned) -> None:
    words = ("--mixed_precision", "no", "--no-gradient_checkpointing", "--optimizer_type", "AdamW")
    plan = planned(*words)
    with pytest.raises(UserError) as error:
        fit.choose(plan, card(4 * MIB))
    said = str(error.value)
    assert "--fit: nothing fits into the 3.8 MiB that a card leaves for tensors: the least is" in said
    assert "--gradient_checkpointing (command line: --no-gradient_checkpointing is given)" in said
    assert "--mixed_precision bf16 (command line: --mixed_precision is given)" in said
    assert "--optimizer_type AdamW8bit (command line: --optimizer_type is given)" in said


def test_a_given_batch_is_not_split_and_a_presets_is(planned: Planned) -> None:
    def batch_lever(plan: Plan) -> levers.Lever:
        return next(lever for lever in levers.levers(plan) if lever.axis == "batch")

    mine = batch_lever(planned("--train_batch_size", "4", "--gradient_accumulation_steps", "2"))
    assert mine.changes == {"train_batch_size": 1, "gradient_accumulation_steps": 8}  # the same images in a step
    assert mine.lacking == "command line: --train_batch_size is given"
    assert levers.is_preset("configs/presets/sdxl.toml [model] cache_latents") == any(
        "sdxl.toml" in str(path) for path in Path("configs/presets").glob("*.toml")
    )


def test_images_that_change_cannot_be_cached(planned: Planned) -> None:
    lever = next(lever for lever in levers.levers(planned("--color_aug")) if lever.axis == "latents")
    assert "color_aug" in lever.lacking


def test_given_rates_of_the_text_encoders_stay(planned: Planned) -> None:
    def of_text(*words: str) -> levers.Lever:
        return next(lever for lever in levers.levers(planned(*words)) if lever.axis == "text")

    assert not of_text().lacking
    assert "text_encoder_lr is given" in of_text("--text_encoder_lr", "1e-5").lacking


def test_every_format_is_a_lever(planned: Planned) -> None:
    offered = {lever.changes["base_format"] for lever in levers.levers(planned()) if lever.axis == "format"}
    assert offered == FORMATS.keys()


def test_the_card(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    options = planned().options
    assert card_of(options) is None
    given = card_of(planned("--gpu_memory", "12GB").options)
    assert given is not None
    assert given.usable == int(12 * 2**30 * 0.95) - 2**29
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    found = card_of(options)
    assert str(found) == "Some GPU: 8.0 GiB, 3.0 GiB free"
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)  # of a dry run that has loaded the model
    assert card_of(options) == Card("Some GPU", 8 * 2**30, 4 * 2**30, context=0)


@pytest.mark.slow
def test_a_run_with_fit(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: chosen, logged, trained with, and resumed with."""
    words = ("--no-cache_latents", "--save_state_on_train_end")
    assert train(*words, "--fit", "600MB") == 0
    said = capsys.readouterr().err
    assert "--fit sets --mixed_precision bf16: 0.55 × the time of a step (measured" in said
    assert "the fastest of the combinations that fit" in said
    record = json.loads((tmp_path / "out" / "test-run.json").read_text(encoding="utf-8"))
    assert record["facts"]["model"]["precision"] == "bf16"
    more = ("--resume", "latest", "--max_train_steps", "6", "--overwrite", "--fit", "8GB")  # it would fit as it is
    assert train(*words, *more) == 0
    assert "the settings of" in capsys.readouterr().err


def test_fit_without_a_card_or_a_size(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--fit") == 2
    assert "error: --fit auto: there is no GPU here; give a size, such as --fit 8GB" in capsys.readouterr().err
    assert train("--fit", "8") == 2
    assert "--fit: '8' has no unit, did you mean '8GB'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_dry_run_prints_the_verdict(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--dry_run", "--gpu_memory", "12GB") == 0
    said = capsys.readouterr().out
    assert "a training step: weights" in said
    assert "\ncard        --gpu_memory 12GB: 12.0 GiB; it fits, with " in said
    assert "--gradient_checkpointing; 1.30 × the time of a step (published: 20 to 30 % more)" in said
    assert train("--dry_run", "--gpu_memory", "520MB") == 0
    assert "it does NOT fit: " in capsys.readouterr().out


@pytest.mark.slow
def test_networks_of_other_packages(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr")
    assert train(*words, "--dry_run") == 0
    assert "what each option would change is not computed" in capsys.readouterr().out
    assert train(*words, "--fit", "8GB") == 2
    assert "error: --fit 8GB: networks of other packages cannot be made" in capsys.readouterr().err


@pytest.mark.slow
def test_the_advice_of_an_error_of_memory(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from library.training import loop

    def backward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. 1 GiB is free")

    monkeypatch.setattr(loop, "backward", backward)
    assert train() == 2
    said = capsys.readouterr().err
    assert "Nothing was trained yet, and nothing was written. What would save most: --" in said
    assert said.count(" less)") == 3
