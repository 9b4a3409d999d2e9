"""What Z-Image alone has in the main job, through the real command line. The job itself is in test_flow_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow_families import CACHED, Words
from tests.tiny_z_image import LAYERS
from tests.training.written import refused, weights

Train = Callable[..., int]


@pytest.fixture
def train_z_image(train: Train, tiny_z_image: Path) -> Train:
    """As `train`, with the tiny Z-Image."""
    return lambda *words: train("--pretrained_model_name_or_path", str(tiny_z_image), *words)


def test_other_kinds_have_dotted_names_too(train_z_image: Train, tmp_path: Path, capsys) -> None:
    """ComfyUI finds no attention layer of Z-Image under kohya's."""
    assert train_z_image(*CACHED, "--network_module", "networks.lokr", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert all(key.startswith("diffusion_model.layers.") for key in found)
    assert any("lokr_w1" in key for key in found)
    assert f"{7 * LAYERS} of {7 * LAYERS} layers load, as trained, in ComfyUI" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--t5xxl", "t5.safetensors"), "is a Z-Image model; the option is for a FLUX.1 model"),
        (("--llm_adapter_path", "a"), "is a Z-Image model; the option is for an Anima model"),
        (("--timestep_sampling", "flux_shift"), "--timestep_sampling flux_shift: .* for which there are sigma, unif"),
        (("--network_train_text_encoder_only",), "only: the text encoder of a Z-Image model is not trained"),
        (("--dit", "a.safetensors"), "--dit.*here: --pretrained_model_name_or_path"),
        (("--text_encoder", "a.safetensors"), "--text_encoder.*here: --qwen3"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_z_image: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_z_image, words, said, capsys)
