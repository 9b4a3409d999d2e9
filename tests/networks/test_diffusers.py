"""What diffusers makes of our files: it must take every tensor, and act as the network did in training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from adapter_models import BASE, difference, lora, outputs, randomize, sd_targets

# Largest difference of an output, relative to the largest output, in fp32: the order of multiplications differs
BOUND = 1e-5


@pytest.fixture
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )


@pytest.mark.parametrize(("conv_dim", "modules"), [(None, 138), (2, 196)])
def test_diffusers_takes_every_tensor_and_gives_the_same_output(
    tiny, pipeline, conv_dim, modules, tmp_path: Path, caplog, monkeypatch
):
    unet, text_encoder = tiny
    base = outputs(unet, text_encoder)
    network = lora(4, 3.0, targets=sd_targets(unet, text_encoder), conv_dim=conv_dim, conv_alpha=0.5)
    network.attach()
    assert sum(network.counts().values()) == modules
    randomize(network, 0.2)
    expected = outputs(unet, text_encoder)
    assert all(difference(with_adapter, without) > 0.02 for with_adapter, without in zip(expected, base, strict=True))
    network.save(str(tmp_path / "adapter.safetensors"), None, {"ss_network_module": "networks.lora"})

    for library in ("diffusers", "transformers", "peft"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    assert not [
        record for record in caplog.records if record.name.split(".")[0] in ("diffusers", "transformers", "peft")
    ]
    taken = [
        name
        for part in (pipeline.unet, pipeline.text_encoder)
        for name, _ in part.named_parameters()
        if "lora_A" in name
    ]
    assert len(taken) == modules

    for actual, wanted in zip(outputs(pipeline.unet, pipeline.text_encoder), expected, strict=True):
        assert difference(actual, wanted) < BOUND
