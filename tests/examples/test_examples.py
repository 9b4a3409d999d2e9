"""The example scripts train, on small random models, with what the presets say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples import adapt_vision_transformer, finetune_language_model, train_diffusers_unet
from library.errors import UserError
from library.optimizers import CustomAdamW, preset_arguments


def test_a_language_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = finetune_language_model.main(["--steps", "100"])
    assert after < before - 0.05
    assert "weight decay 0.0100" in capsys.readouterr().out


def test_a_language_model_learns_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"instruction": f"Add {a} and {b}.", "output": "The sum is a number."}
        | ({"input": "carefully"} if a % 2 else {})
        for a in range(5)
        for b in range(5)
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    before, after = finetune_language_model.main(
        ["--instructions", str(file), "--steps", "60", "--learning_rate", "5e-3"]
    )
    assert after < before - 0.5
    assert "perplexity" in capsys.readouterr().out


def test_only_answers_count() -> None:
    lines = ['{"instruction": "a", "output": "bc"}', "", '{"instruction": "a", "input": "d", "output": "b"}']
    samples, labels = finetune_language_model.of_instructions(lines, lambda text: list(text.encode()), end=0)
    assert samples.shape == labels.shape
    assert [bytes(row[row != finetune_language_model.NO_LOSS].tolist()) for row in labels] == [b"bc\0", b"b\0"]
    assert bytes(samples[1].tolist()).rstrip(b"\0") == b"### Instruction:\na\n\n### Input:\nd\n\n### Response:\nb"


@pytest.mark.parametrize("preset", ["vision_transformer_adapt", "image_classification"])
def test_a_vision_transformer_learns(preset: str) -> None:
    before, after = adapt_vision_transformer.main(["--steps", "60", "--preset", preset])
    assert after < before - 0.05


@pytest.mark.slow
def test_a_unet_learns_and_its_lora_is_saved(tmp_path: Path) -> None:
    before, after = train_diffusers_unet.main(["--steps", "30", "--learning_rate", "4e-3", "--save_to", str(tmp_path)])
    assert after < before * 0.99
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name or "lora.up" in name)


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
