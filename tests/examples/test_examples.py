"""Programs of others train with what the presets say; a diffusers UNet with its LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples import train_diffusers_unet
from library.errors import UserError
from library.optimizers import CustomAdamW, preset_arguments


@pytest.mark.slow
def test_a_unet_learns_and_its_lora_is_saved(tmp_path: Path) -> None:
    before, after = train_diffusers_unet.main(["--steps", "30", "--learning_rate", "4e-3", "--save_to", str(tmp_path)])
    assert after < before * 0.99
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name or "lora.up" in name)


def test_images_that_a_unet_cannot_learn(tmp_path: Path) -> None:
    frozen = train_diffusers_unet.Frozen(str(train_diffusers_unet.QUICKSTART / "base"))
    with pytest.raises(UserError, match=r"there is no \.png in "):
        frozen.encode(tmp_path, size=64)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"a\.txt: no such caption"):
        frozen.encode(tmp_path, size=64)


def test_layers_and_what_is_not_the_optimizers() -> None:
    curve = {"dynamic_weight_decay": True, "wd_schedule": "exponential"}
    plain = preset_arguments("language_model_finetune")
    assert plain == curve | {
        "lr": 5e-5, "wd_transition_steps": 1200, "wd_decay_factor": 0.75, "wd_min_ratio": 0.15,
    }  # fmt: skip
    layered = preset_arguments("language_model_finetune", "aggressive")
    assert (layered["lr"], layered["wd_transition_steps"]) == (5e-5, 800)
    assert preset_arguments("sd15_style") == {"lr": 1e-4}


def test_origin_is_accepted_by_the_optimizer() -> None:
    import torch

    arguments = preset_arguments("origin")
    assert (arguments["alora_ratio"], arguments["optim_bits"]) == (16.0, 32)
    optimizer = CustomAdamW(torch.nn.Linear(2, 2).named_parameters(), **arguments)
    assert optimizer.defaults["tam_beta"] == 0.999


def test_an_unknown_preset() -> None:
    with pytest.raises(UserError, match="no preset 'orign', did you mean 'origin'"):
        preset_arguments("orign")
