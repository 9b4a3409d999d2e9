"""Fine-tunes a language model with LoRA (transformers + peft) and CustomAdamW, with the numbers of a preset.

    python examples/finetune_language_model.py
    python examples/finetune_language_model.py --model path/to/a/model --text my.txt --steps 2000

Without --model a small model with random weights stands in, which reads bytes: that shows the wiring, not what a real
model gains. The preset says the optimizer's part; the model, the data and the loop are this script's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler

from library.optimizers import CustomAdamW, preset_arguments

CONTEXT = 64  # tokens of one sample
TEXT = Path(__file__).parents[1] / "docs" / "optimizer.md"


def load(model: str | None, text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and the text as one row of its tokens."""
    if model is not None:
        tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
        return AutoModelForCausalLM.from_pretrained(model), tokens
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **small)), torch.tensor(list(text.encode()))


def loss_on(model: torch.nn.Module, samples: torch.Tensor) -> torch.Tensor:
    """The mean loss of predicting each token of `samples` (rows of tokens) from those before it."""
    return model(input_ids=samples, labels=samples).loss


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train; the loss on text that was held out, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder (default: a small one with random weights)")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text to learn")
    parser.add_argument("--preset", nargs="*", default=["language_model_finetune"])
    parser.add_argument("--learning_rate", type=float, help="instead of the preset's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    wanted = parser.parse_args(argv)
    torch.manual_seed(0)

    base, tokens = load(wanted.model, wanted.text.read_text(encoding="utf-8"))
    samples = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    held_out, training = samples[-16:], samples[:-16]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    arguments = preset_arguments(*wanted.preset)
    if wanted.learning_rate is not None:
        arguments["lr"] = wanted.learning_rate
    # with their names, by which it finds the LoRA pairs
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = CustomAdamW(trained, **arguments)
    warmup = round(0.05 * wanted.steps)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=wanted.steps)

    with torch.no_grad():
        before = loss_on(model, held_out).item()
    for step in range(1, wanted.steps + 1):
        loss = loss_on(model, training[torch.randint(len(training), (wanted.batch_size,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            decay = optimizer.get_optimization_info()["weight_decay"][0]
            print(f"step {step}: loss {loss.item():.4f}, weight decay {decay:.4f}")
    with torch.no_grad():
        after = loss_on(model, held_out).item()
    print(f"held-out loss {before:.4f} before, {after:.4f} after")
    return before, after


if __name__ == "__main__":
    main()
