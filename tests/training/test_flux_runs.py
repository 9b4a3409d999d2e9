"""What FLUX.1 alone has in the main job, through the real command line. The job itself is in test_flow_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.flow_families import CACHED, FLOW, Words
from tests.training.written import refused, weights

Train = Callable[..., int]


@pytest.fixture
def train_flux(train: Train, tiny_flux: Path) -> Train:
    """As `train`, with the tiny FLUX.1."""
    return partial(train, "--pretrained_model_name_or_path", str(tiny_flux), *FLOW["flux"].short())


@pytest.mark.parametrize(("section", "other"), [("double", "single"), ("single", "double")])
def test_one_kind_of_blocks_alone(train_flux: Train, tmp_path: Path, section: str, other: str) -> None:
    assert (
        train_flux("--network_train_unet_only", "--max_train_steps", "1", "--network_args", f"train_blocks={section}")
        == 0
    )
    found = weights(tmp_path)
    assert any(key.startswith(f"lora_unet_{section}_blocks") for key in found)
    assert not any(key.startswith(f"lora_unet_{other}_blocks") for key in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--debiased_estimation_loss",), "--debiased_estimation_loss: .* is trained by flow matching"),
        (("--v_pred_like_loss", "1"), "--v_pred_like_loss: .* is trained by flow matching"),
        (("--multires_noise_iterations", "6"), "--multires_noise_iterations: .* is a FLUX.1 model"),
        (("--v_parameterization",), "is a FLUX.1 model; the option is for a Stable Diffusion"),
        (("--model_prediction_type", "sigma_scaled"), "sigma_scaled changes the prediction .* raw is right"),
        (("--network_args", "split_qkv=True"), "split_qkv is known .*adapters of their own in any case"),
        (("--network_args", "train_blocks=doubel"), "train_blocks: 'doubel': this model's are double, single, or all"),
        (("--discrete_flow_shift", "0"), "--discrete_flow_shift must be above 0"),
        (("--split_mode",), "--split_mode.*here: --blocks_to_swap"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_flux: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_flux, words, said, capsys)


def test_its_timesteps_are_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    said = "--timestep_sampling flux_shift: .* for which there are sigma, uniform"
    refused(train, ("--timestep_sampling", "flux_shift"), said, capsys)


def test_what_guis_write_for_every_model_is_no_mistake(train: Train) -> None:
    words = ("--discrete_flow_shift", "3.1582", "--guidance_scale", "3.5", "--model_prediction_type", "raw")
    assert train(*words, "--max_train_steps", "1") == 0


def test_kohyas_guidance_is_warned_of(train_flux: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_flux("--guidance_scale", "3.5", "--max_train_steps", "1", *CACHED) == 0
    said = capsys.readouterr().err
    assert "--guidance_scale 3.5: the LoRA learns what the model does when it is told so much; 1 is usual" in said
