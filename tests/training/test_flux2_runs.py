"""What FLUX.2 klein alone has in the main job, through the real command line. The job itself is in
test_flow_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.flow_families import CACHED, FLOW, Words
from tests.tiny_flux2 import LAYERS
from tests.training.written import refused, weights

Train = Callable[..., int]


@pytest.fixture
def train_klein(train: Train, tiny_flux2: Path) -> Train:
    """As `train`, with the tiny FLUX.2 klein."""
    return partial(train, "--pretrained_model_name_or_path", str(tiny_flux2), *FLOW["flux2"].short())


def test_diffusers_names(train_klein: Train, tmp_path: Path, capsys) -> None:
    """If they are asked for: each layer with its own pair."""
    assert train_klein(*CACHED, "--save_naming", "diffusers", "--max_train_steps", "1") == 0
    found = weights(tmp_path)
    assert len(found) == 2 * LAYERS
    assert found.keys() > {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"}
    assert f"{LAYERS} of {LAYERS} layers load, as trained, in ComfyUI, diffusers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--t5xxl", "t5.safetensors"), "is a FLUX.2 klein model; the option is for a FLUX.1 model"),
        (("--guidance_scale", "2"), "is a FLUX.2 klein model; the option is for a FLUX.1 model"),
        (("--turbo",), "is a FLUX.2 klein model; the option is for a Z-Image model"),
        (("--timestep_sampling", "flux_shift"), "--timestep_sampling flux_shift: .* for which there are sigma, unif"),
        (("--network_train_text_encoder_only",), "only: the text encoder of a FLUX.2 klein model is not trained"),
        (("--model_version", "dev"), "--model_version.*FLUX.2 dev is not supported: 32 billion"),
        (("--dit", "a.safetensors"), "--dit.*here: --pretrained_model_name_or_path"),
        (("--text_encoder", "a.safetensors"), "--text_encoder.*here: --qwen3"),
        (("--fp8_text_encoder",), "--fp8_text_encoder.*here: --text_encoder_format fp8"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(
    train_klein: Train, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    refused(train_klein, words, said, capsys)
