"""The formulas of `python -m library.guidance.memory` against numbers that are computed here in another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.guidance import memory
from library.guidance.memory import Model, needs


def test_full_fine_tuning_of_7b() -> None:
    """16 bytes a parameter and no more: 2 + 4 + 2 + 8."""
    found = needs(
        Model(parameters=7_000_000_000, layers=32, hidden=4096),
        rank=16, batch=1, sequence=2048, precision="bf16", optimizer="AdamW", checkpointing=True,
    )["full fine-tune"]  # fmt: skip
    assert sum(value for name, value in found.items() if name != "activations") == 16 * 7_000_000_000
    assert found["activations"] == 2048 * 4096 * (2 * 32 + 34)


def test_qlora_holds_the_base_in_a_quarter() -> None:
    found = needs(
        Model(parameters=1_000_000_000, layers=24, hidden=2048),
        rank=8, batch=1, sequence=512, precision="bf16", optimizer="AdamW8bit", checkpointing=False,
    )  # fmt: skip
    assert found["QLoRA"]["weights"] / found["LoRA"]["weights"] == pytest.approx(0.258, abs=1e-3)
    assert found["QLoRA"]["optimizer state"] == found["QLoRA"]["adapter"] / 2


def test_lora_counts_as_adapters_on_layers_would() -> None:
    hidden, wide, rank = 96, 256, 4
    layers = [nn.Linear(hidden, hidden, device="meta") for _ in range(4)]
    layers += [nn.Linear(hidden, wide, device="meta"), nn.Linear(hidden, wide, device="meta")]
    layers += [nn.Linear(wide, hidden, device="meta")]
    counted = sum(rank * sum(layer.weight.shape) for layer in layers)
    assert Model(parameters=1, layers=3, hidden=hidden).of_lora(rank) == 3 * counted


@pytest.mark.parametrize(("size", "layers", "hidden"), [(7e9, 32, 4096), (13e9, 40, 5120), (65e9, 80, 8192)])
def test_usual_shapes_are_near_those_of_llama(size: float, layers: int, hidden: int) -> None:
    model = Model.of_size(int(size))
    assert model.layers == pytest.approx(layers, rel=0.2)
    assert model.hidden == pytest.approx(hidden, rel=0.1)


def test_activations_of_a_real_block_are_no_more_than_the_formula() -> None:
    """34 bytes a token and channel are with dropout, whose masks are 4 of them; torch's block keeps more copies than
    Megatron's, but not by a factor."""
    from torch.autograd.graph import saved_tensors_hooks

    block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(2, 128, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    found = sum(size for place, size in kept.items() if place not in weights)
    formula = Model(parameters=1, layers=1, hidden=64).activations(
        batch=2, sequence=128, precision="bf16", checkpointing=False
    )
    assert out.shape == x.shape
    assert 0.5 * formula < found < 2 * formula


@pytest.mark.parametrize("word", ["7x", "B", "", "0", "-1B", "1.2.3B"])
def test_wrong_sizes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        memory.main([f"--parameters={word}"])
    assert ended.value.code == 2
    assert "is not a number of parameters such as 7B" in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parameters", "7B", "--rank", "16", "--layers", "32", "--hidden", "4096", "--gpu_memory", "24GB"]
    assert memory.main([*words, "--checkpointing"]) == 0
    said = capsys.readouterr().out
    assert "39,846,400 of a LoRA of rank 16 on all linear layers" in said
    assert said.splitlines()[-3].split()[-5:] == ["does", "not", "fit", "fits", "fits"]
