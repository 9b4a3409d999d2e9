"""What Chroma alone has in the main job, through the real command line. The job itself is in test_flow_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow_families import CACHED, Words
from tests.training.written import refused

Train = Callable[..., int]


@pytest.fixture
def train_chroma(train: Train, tiny_chroma: Path) -> Train:
    """As `train`, with the tiny Chroma."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_chroma), *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model_type", "flux"), "--model_type: 'flux' is wrong: .* is a Chroma model, 'chroma'"),
        (("--clip_l", "clip_l.safetensors"), "--clip_l: .* is a Chroma model; the option is for a FLUX.1 model"),
        (("--network_train_text_encoder_only",), "the text encoder of a Chroma model is not trained"),
        (("--network_args", "train_blocks=doubel"), "train_blocks: 'doubel': this model's are double, single, or all"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_chroma: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_chroma, words, said, capsys)


def test_its_name_is_refused_for_others(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train, ("--model_type", "chroma"), "--model_type: ", capsys)


def test_what_has_no_effect_is_said(train_chroma: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_chroma("--guidance_scale", "3.5", "--max_train_steps", "1", *CACHED) == 0
    said = capsys.readouterr().err
    assert "--guidance_scale has no effect: Chroma is told no guidance" in said
    assert "T5's padding is hidden without --apply_t5_attn_mask, too" in said
