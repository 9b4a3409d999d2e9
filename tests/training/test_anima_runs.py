"""What Anima alone has in the main job, through the real command line. The job itself is in test_flow_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow_families import CACHED, Words
from tests.training.written import ROUNDED, distance, refused, same, weights

Train = Callable[..., int]


@pytest.fixture
def train_anima(train: Train, tiny_anima: Path) -> Train:
    """As `train`, with the tiny Anima."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_anima), *words)


def test_a_cached_text_is_one_that_is_encoded_in_each_step(train_anima: Train, tmp_path: Path) -> None:
    """The longest captions of a batch differ, and so does the number of states that are cached."""
    common = ("--network_train_unet_only", "--max_train_steps", "2", "--save_naming", "kohya")
    for name, words in {"cached": CACHED, "fresh": ()}.items():
        assert train_anima(*common, "--output_name", name, *words) == 0
    assert distance(weights(tmp_path, "cached"), weights(tmp_path, "fresh")) < ROUNDED


@pytest.mark.slow
def test_either_naming_is_trained_on(train_anima: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of rate 0 leaves what was read: the same weights, whichever names they had."""
    assert train_anima(*CACHED, "--output_name", "dotted", "--max_train_steps", "1") == 0
    given = ("--network_weights", str(tmp_path / "out" / "dotted.safetensors"), "--dim_from_weights")
    nothing = ("--learning_rate", "1e-30", "--max_train_steps", "1", "--optimizer_type", "SGD")
    assert train_anima(*CACHED, *given, *nothing, "--save_naming", "kohya", "--output_name", "flat") == 0
    again = ("--network_weights", str(tmp_path / "out" / "flat.safetensors"), "--dim_from_weights")
    assert train_anima(*CACHED, *again, *nothing, "--output_name", "back") == 0
    assert same(weights(tmp_path, "dotted"), weights(tmp_path, "back"))
    assert all(key.startswith("lora_unet_blocks_") for key in weights(tmp_path, "flat"))


def test_other_kinds_have_kohyas_names(train_anima: Train, tmp_path: Path) -> None:
    """No other program than ComfyUI reads them, and it reads these."""
    assert train_anima(*CACHED, "--network_module", "networks.lokr", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert all(key.startswith("lora_unet_blocks_") for key in found)
    assert any("lokr_w1" in key for key in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--t5xxl", "t5.safetensors"), "is an Anima model; the option is for a FLUX.1 model"),
        (("--guidance_scale", "1.5"), "is an Anima model; the option is for a FLUX.1 model"),
        (
            ("--timestep_sampling", "flux_shift"),
            "--timestep_sampling flux_shift: .* for which there are sigma, uniform",
        ),
        (
            ("--network_args", "train_llm_adapter=True"),
            "train_llm_adapter is known .*Anima's LLM adapter is not trained",
        ),
        (("--self_attn_lr", "1e-4"), "--self_attn_lr.*here: network_reg_lrs"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_anima: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_anima, words, said, capsys)
