"""Layer-wise rates: the closed form, on the models whose names of modules they must know."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from library.errors import UserError
from library.optimizers import CustomAdamW, layer_groups

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=9, num_hidden_layers=3, num_key_value_heads=2, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=3, n_head=2)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=9, num_hidden_layers=3, **SMALL)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=3, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=9, num_hidden_layers=3, **SMALL)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_hidden_layers=3, **SMALL)
    ),
}  # fmt: skip


def rates(model: nn.Module, **more: float) -> dict[str, float]:
    """The rate of each parameter by its name."""
    groups = layer_groups(model.named_parameters(), lr=1.0, **more)
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_the_closed_form(name: str) -> None:
    """lr(layer i of n) = base · decay ** (n - 1 - i); embeddings count as the layer below, the rest has the base."""
    with torch.device("meta"):
        model = MODELS[name]()
    found = rates(model, decay=0.5)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for parameter, rate in found.items():
        numbers = [int(part) for part in parameter.split(".") if part.isdecimal()]
        if numbers:
            assert rate == 0.5 ** (2 - numbers[0]), parameter
        elif any(word in parameter for word in ("embed", "wte", "wpe")) and not parameter.startswith("embed_out"):
            assert rate == 0.125, parameter
        else:
            assert rate == 1.0, parameter
    assert {0.25, 0.5, 1.0, 0.125} == set(found.values())


def test_an_encoder_and_a_decoder_are_counted_by_themselves() -> None:
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=3, num_heads=2
            )
        )
    found = rates(model, decay=0.5)
    assert found["encoder.block.0.layer.1.DenseReluDense.wi.weight"] == 0.5
    assert found["encoder.block.1.layer.0.SelfAttention.q.weight"] == 1.0
    assert found["decoder.block.0.layer.2.DenseReluDense.wi.weight"] == 0.25
    assert found["encoder.final_layer_norm.weight"] == found["decoder.final_layer_norm.weight"] == 1.0
    assert found["shared.weight"] <= 0.25


def test_stages_of_layers() -> None:
    with torch.device("meta"):
        model = transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=16, patch_size=2, embed_dim=4, depths=[1, 2], num_heads=[1, 2], window_size=2
            )
        )
    found = rates(model, decay=0.5)
    blocks = [f"swin.encoder.layers.{stage}.blocks.{block}." for stage, block in ((0, 0), (1, 0), (1, 1))]
    for place, block in enumerate(blocks):
        assert {rate for name, rate in found.items() if name.startswith(block)} == {0.5 ** (2 - place)}
    assert found["swin.embeddings.patch_embeddings.projection.weight"] == 0.125


def test_adapters_and_what_is_frozen() -> None:
    model = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    groups = layer_groups(model.named_parameters(), lr=2.0)
    assert [group["lr"] for group in groups] == pytest.approx([2 * 0.81, 2 * 0.9, 2.0, 2.0])
    assert {id(parameter) for group in groups for _, parameter in group["params"]} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }
    optimizer = CustomAdamW(groups, lr=9.0, weight_decay=0.0)
    pairs = optimizer.get_optimization_info()["lora_pairs"]
    assert pairs == 3 * 7  # found by the names that the groups carry


def test_a_lower_layer_moves_less() -> None:
    torch.manual_seed(0)
    model = MODELS["vit"]()
    optimizer = CustomAdamW(layer_groups(model.named_parameters(), lr=1e-3, decay=0.1), weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(pixel_values=torch.randn(2, 3, 8, 8)).logits.square().sum().backward()
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    by_depth = [
        max(value for name, value in moved.items() if f"layer.{i}." in name or f"layers.{i}." in name) for i in range(3)
    ]
    # Adam's first step is the rate itself
    assert by_depth == pytest.approx([1e-5, 1e-4, 1e-3], rel=0.05)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(UserError, match="decay must be above 0 and at most 1"):
        layer_groups(MODELS["gpt2"]().named_parameters(), lr=1.0, decay=decay)


def test_no_layers() -> None:
    with pytest.raises(UserError, match="no trained parameter is in a numbered layer, such as 'weight'"):
        layer_groups(nn.Linear(2, 2).named_parameters(), lr=1.0)
    with pytest.raises(UserError, match="all are frozen"):
        layer_groups(nn.Linear(2, 2).requires_grad_(False).named_parameters(), lr=1.0)
