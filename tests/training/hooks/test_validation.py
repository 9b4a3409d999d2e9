"""Validation through the real command line: numbers that can be compared, training that does not notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fixed_noise_loss import fixed_noise_loss, mean_squares
from library.config.options.validation import ValidationOptions, check_validation
from library.diffusion.process import middles
from library.models.components import Components
from library.models.stable_diffusion import StableDiffusion
from library.optimizers.weight_decay_hook import WeightDecayHook
from library.training import state
from library.training.fixed_noise import image_losses
from tests.conftest import BASE, IMAGES
from tests.quick import slow
from tests.training.test_resume import stop_after
from tests.training.written import assert_refused, metadata, same, weights

Train = Callable[..., int]
SPLIT = ("--validation_split", "0.34")  # two of six


def measured(folder: Path, name: str = "test") -> list[tuple[int, float, dict[int, float]]]:
    """(step, loss, by timestep) of each validation of a run that has saved its state."""
    tensors = torch.load(folder / "out" / f"{name}-state" / state.TENSORS, weights_only=True)
    return [tuple(one) for one in tensors["hooks"]["validation"]["validations"]]


# --- the measure ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> StableDiffusion:
    from library.models.opening import open_family

    family = open_family(str(BASE))
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    family.components.load("denoiser", torch.float32, "cpu")
    return family


def test_the_noise_of_an_image_does_not_depend_on_its_batch(family: StableDiffusion) -> None:
    latents = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    keys = list("abcde")
    torch.manual_seed(1)
    with torch.no_grad():
        condition = family.encode_prompts(["a fox"] * 5)["hidden_states"]

    def losses(rows: list[int], seed: int = 0) -> torch.Tensor:
        picked = {"hidden_states": condition[rows]}
        own = [keys[row] for row in rows]
        return image_losses(family, latents[rows], picked, 500, keys=own, seed=seed, loss=mean_squares)

    together, turned = losses([0, 1, 2, 3, 4]), losses([4, 2, 0])
    torch.testing.assert_close(turned, together[[4, 2, 0]], rtol=1e-5, atol=0)
    assert torch.equal(together, losses([0, 1, 2, 3, 4]))
    assert not torch.allclose(together, losses([0, 1, 2, 3, 4], seed=1), rtol=1e-3)


def test_fixed_noise_loss_is_the_same_for_any_batch_size(family: StableDiffusion) -> None:
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    one, all_at_once = (fixed_noise_loss(family, latents, ["a", "b", "c"], seed=4, batch_size=size) for size in (1, 3))
    assert one == pytest.approx(all_at_once, rel=1e-5)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--network_dropout", "0.3", "--shuffle_caption", "--ema_decay", "0.9", "--ema_for", "validate"),
        slow((("--no-cache_latents", "--max_data_loader_n_workers", "2", "--flip_aug", "--random_crop"),)),
        slow(
            (
                (
                    *("--optimizer_type", "AdamWScheduleFree", "--mixed_precision", "bf16", "--vae_batch_size", "4"),
                    *("--cache_text_encoder_outputs", "--network_train_unet_only"),
                ),
            )
        ),
    ],
    ids=lambda words: words[0].removeprefix("--"),
)
def test_training_does_not_notice(words: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    """The same images trained with and without others to validate on: the same bits."""
    other = tmp_path / "other"
    other.mkdir()
    for image in sorted((IMAGES / "validation").glob("*.png"))[:3]:
        shutil.copy(image, other)
        shutil.copy(image.with_suffix(".txt"), other)
    for name, more in (("without", ""), ("with", f"validation_dir = '{other.as_posix()}'\n")):
        config = tmp_path / f"{name}.toml"
        folder = (tmp_path / "data" / "2_style").as_posix()
        config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 2\n{more}")
        train_words = ("--dataset_config", str(config), "--train_data_dir", "", "--output_name", name)
        assert train(*words, *train_words, "--validate_every_n_steps", "1", "--max_train_steps", "2") == 0
    assert same(weights(tmp_path, "without"), weights(tmp_path, "with"))
    assert (tmp_path / "out" / "with-best.safetensors").exists()
    assert metadata(tmp_path, "with")["ss_num_validation_images"] == "3"


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_how_they_are_made(train: Train, tmp_path: Path) -> None:
    """Before training the network does nothing: whatever changes then comes from the measuring."""
    variants: dict[str, tuple[str, ...]] = {
        "plain": (),
        "batch": ("--train_batch_size", "1"),
        "drawn": (
            *("--shuffle_caption", "--caption_tag_dropout_rate", "0.9", "--no-cache_latents", "--random_crop"),
            *("--max_data_loader_n_workers", "2"),
        ),
        "training's seed": ("--seed", "2", "--validation_seed", "1"),
        "validation's seed": ("--validation_seed", "2"),
    }
    found = {}
    for name, words in variants.items():
        more = ("--max_train_steps", "1", "--save_state_on_train_end", "--output_name", name)
        assert train(*SPLIT, *more, *words) == 0
        found[name] = measured(tmp_path, name)[0]
    assert found.pop("validation's seed")[1] != pytest.approx(found["plain"][1], rel=1e-3)
    for name, (step, loss, by_timestep) in found.items():
        assert step == 0
        assert loss == pytest.approx(found["plain"][1], rel=1e-5), name
        assert by_timestep == pytest.approx(found["plain"][2], rel=1e-4), name


def test_what_is_said_and_written(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("--validate_every_n_steps", "2", "--max_validation_steps", "1", "--train_batch_size", "1")
    logs = ("--logging_dir", str(tmp_path / "logs"), "--save_state_on_train_end")
    assert train(*SPLIT, *words, *logs, "--max_train_steps", "3") == 0
    messages = capsys.readouterr().err
    (event,) = (tmp_path / "logs").rglob("events*")
    events = EventAccumulator(str(event.parent))
    events.Reload()
    curves = [f"loss/validation/t{t}" for t in middles(0, 1000)]
    curves += ["loss/validation/step_average", "loss/validation/step_divergence"]
    assert {name for name in events.Tags()["scalars"] if "validation" in name} == set(curves)
    history = measured(tmp_path)
    assert [step for step, _, _ in history] == [0, 2, 3]
    found = events.Scalars("loss/validation/step_average")
    assert [(one.step, one.value) for one in found] == [(step, pytest.approx(loss)) for step, loss, _ in history]
    assert history[1][1] == pytest.approx(sum(history[1][2].values()) / 5)
    assert "2 images are held out for validation; 4 are left to train" in messages
    assert "validation  2 images held out: 1 batch × 5 noise levels, 3 times" in messages
    assert "validation was lowest at" in messages
    said = metadata(tmp_path, "test-best")
    assert (said["ss_num_validation_images"], said["ss_num_train_images"]) == ("2", "8")
    assert (said["ss_validation_split"], said["ss_validation_seed"]) == ("0.34", "None")
    assert (said["ss_validate_every_n_steps"], said["ss_max_validation_steps"]) == ("2", "1")


def losses_of(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """The validations of a run find these, one after the other, and the last one for good."""
    left = list(losses)

    def found(*_: Any) -> dict[int, float]:
        return {500: left.pop(0) if len(left) > 1 else left[0]}

    monkeypatch.setattr("library.training.hooks.validation.measure", found)


STOPS = (*SPLIT, "--validate_every_n_steps", "1", "--early_stopping_patience", "2", "--max_train_steps", "9")


def test_early_stopping_keeps_the_best_and_ends_well(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses_of(monkeypatch, [1.0, 0.9, 0.8, 0.85, 0.84])
    assert train(*STOPS, "--save_every_n_steps", "2", "--save_state_on_train_end") == 0
    messages = capsys.readouterr().err
    assert "early stopping after step 4: 2 validations without improvement" in messages
    assert "lowest at step 2 (0.8000) (1.0000 before training); the last 2 steps made it 5.0% worse" in messages
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test-best.safetensors",
        "test-metrics.jsonl",
        "test-run.json",
        "test-state",
        "test-step00000002.safetensors",
        "test-step00000004.safetensors",
        "test.safetensors",
    ]
    assert same(weights(tmp_path, "test-best"), weights(tmp_path, "test-step00000002"))
    assert same(weights(tmp_path, "test"), weights(tmp_path, "test-step00000004"))
    assert [metadata(tmp_path, name)["ss_steps"] for name in ("test", "test-best")] == ["4", "2"]


@pytest.mark.slow
def test_the_best_file_can_be_trained_on(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SPLIT, "--max_train_steps", "1") == 0
    best = str(tmp_path / "out" / "test-best.safetensors")
    assert (
        train("--network_weights", best, "--dim_from_weights", "--output_name", "next", "--max_train_steps", "1") == 0
    )
    (tmp_path / "out" / "test.safetensors").unlink()
    assert train(*SPLIT) == 2
    assert "test-best.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--ema_decay", "0.99", "--network_dropout", "0.2"),
        slow((("--mixed_precision", "bf16", "--full_bf16", "--ema_decay", "0.99", "--network_dropout", "0.2"),)),
        slow(
            (
                (
                    *("--dynamic_weight_decay", "--optimizer_args", "weight_decay=0.5", "--wd_schedule", "adaptive"),
                    *("--wd_flat", "window=3", "slope=10", "earliest=0", "validation=10"),
                ),
            )
        ),
    ],
    ids=["ema", "ema of bf16", "wd_flat"],
)
def test_a_resumed_run_has_the_same_history(
    words: tuple[str, ...], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*SPLIT, *words, "--validate_every_n_steps", "1", "--max_train_steps", "3", "--save_state_on_train_end")
    assert train(*common, "--output_name", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*common, "--output_name", "broken") == 130
    assert train(*common, "--output_name", "broken", "--resume", "latest") == 0
    assert measured(tmp_path, "whole") == measured(tmp_path, "broken")
    for name in ("", "-best"):
        assert same(weights(tmp_path, f"whole{name}"), weights(tmp_path, f"broken{name}"))
    whole, broken = (
        torch.load(tmp_path / "out" / f"{name}-state" / state.TENSORS, weights_only=True)
        for name in ("whole", "broken")
    )
    assert ("average" in whole["hooks"]) == ("--ema_decay" in words)
    if "average" in whole["hooks"]:
        one, other = (tensors["hooks"]["average"] for tensors in (whole, broken))
        assert one["steps"] == other["steps"] == 3
        assert all(map(torch.equal, one["average"], other["average"]))


@pytest.mark.slow
def test_patience_goes_on_counting(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses_of(monkeypatch, [1.0, 0.9, 0.95, 0.95])
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*STOPS) == 130
    assert train(*STOPS, "--resume", "latest", "--save_state_on_train_end") == 0
    assert [step for step, _, _ in measured(tmp_path)] == [0, 1, 2, 3]
    (tmp_path / "out" / "test-best.safetensors").unlink()
    capsys.readouterr()
    more = ("--resume", str(tmp_path / "out" / "test-state"), "--early_stopping_patience", "4")
    assert train(*STOPS, *more, "--save_state_on_train_end") == 0
    assert "test-best.safetensors, of the best validation (0.9000 at step 1), is missing" in capsys.readouterr().err
    assert [step for step, _, _ in measured(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_the_best_file_is_that_of_the_history_that_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Back from step 4 to one before it, with other settings: the best of then is not what comes after any more."""
    losses_of(monkeypatch, [1.0, 0.9, 0.8, 0.85, 0.7, 0.95, 0.99, 0.97])
    words = (*SPLIT, "--validate_every_n_steps", "1", "--save_every_n_steps", "1", "--save_state")
    assert train(*words) == 0
    anyway = ("--resume_anyway", "--learning_rate", "5e-4")
    for step, best in (("3", "4"), ("2", "2")):
        capsys.readouterr()
        assert train(*words, *anyway, "--resume", str(tmp_path / "out" / f"test-step0000000{step}-state")) == 0
        said = capsys.readouterr().err
        assert metadata(tmp_path, "test-best")["ss_steps"] == best
        assert ("is of step 4, and the best validation before the state, at step 2 (0.8000)" in said) == (step == "3")
        assert ("there is no file of the best" in said) == (step == "3")
        assert ("test-best.safetensors is the one to use" in said) == (step == "2")
    assert same(weights(tmp_path, "test-best"), weights(tmp_path, "test-step00000002"))


def test_the_weight_decay_waits_for_validation(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--wd_flat validation is told each validation once, before the next step."""
    told: list[float | None] = []
    observe = WeightDecayHook.observe

    def watched(self: WeightDecayHook, loss: float, norm: float | None, validation: float | None) -> None:
        told.append(validation)
        observe(self, loss, norm, validation)

    monkeypatch.setattr(WeightDecayHook, "observe", watched)
    losses_of(monkeypatch, [1.0, 0.9, 0.8])
    decay = ("--dynamic_weight_decay", "--optimizer_args", "weight_decay=0.5", "--wd_schedule", "adaptive")
    assert train(*SPLIT, "--validate_every_n_steps", "2", *decay, "--wd_flat", "validation=0.1") == 0
    assert told == [1.0, None, 0.9, None]


@pytest.mark.slow
def test_the_caches_on_disk_hold_both(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--no-cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    words = (*SPLIT, *words, "--network_train_unet_only", "--max_train_steps", "1", "--save_state_on_train_end")
    assert train(*words, "--output_name", "first") == 0
    load = Components.load

    def denoiser(self: Components, name: str, *to: Any, **how: Any) -> torch.nn.Module:
        assert name == "denoiser", "encoded again"
        return load(self, name, *to, **how)

    monkeypatch.setattr(Components, "load", denoiser)
    assert train(*words, "--output_name", "second") == 0
    assert "of other images" not in capsys.readouterr().err
    assert measured(tmp_path, "first") == measured(tmp_path, "second")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--early_stopping_patience", "2"), "--early_stopping_patience needs images to validate on"),
        (("--validation_split", "0.01"), "validation_split 0.01 of 6 different images is none: at least 0.084"),
        (("--validation_split", "1"), "all of them are held out for validation"),
        (("--validation_split", "1.5"), "--validation_split: must be at most 1, not 1.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(
    words: tuple[str, ...], message: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(train, words, message, tmp_path, capsys)


def test_what_has_no_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_validation(ValidationOptions(validate_every_n_steps=2, early_stopping_threshold=0.1), validated=False)
    assert [record.getMessage() for record in caplog.records] == [
        "--validate_every_n_steps has no effect: it matters only together with --validation_split",
        "--early_stopping_threshold has no effect without --early_stopping_patience",
    ]


@pytest.mark.slow
def test_a_dry_run_counts_the_best_file(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--dry_run", "--early_stopping_patience", "3", "--cache_latents_to_disk", "--ema_decay", "0.9")
    assert train(*SPLIT, *words) == 0
    said = capsys.readouterr().out
    assert "2 images held out: 1 batch × 5 noise levels, 2 times; ends early after 3 validations without" in said
    assert "2 files of" in said
    assert "test-best.safetensors" in said
    assert "latents: 6 files" in said
    assert "average     546.0 KiB, and a copy of the weights" in said
