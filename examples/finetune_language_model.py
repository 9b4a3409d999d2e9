"""Fine-tunes a language model with LoRA (transformers + peft) and CustomAdamW, with the numbers of a preset.

    python examples/finetune_language_model.py
    python examples/finetune_language_model.py --model path/to/a/model --text my.txt --steps 2000
    python examples/finetune_language_model.py --model path/to/a/model --instructions my.jsonl --steps 2000

A line of --instructions is {"instruction": ..., "input": ..., "output": ...}, without "input" where there is none. Then
the loss is that of the outputs alone: the model learns to answer, not to ask.

Without --model a small model with random weights stands in, which reads bytes: that shows the wiring, not what a real
model gains. The preset says the optimizer's part; the model, the data and the loop are this script's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler

from library.optimizers import CustomAdamW, preset_arguments

CONTEXT = 64  # tokens of one sample of a text
LONGEST = 512  # tokens of an instruction with its output; what is longer is cut
NO_LOSS = -100  # the label of tokens that no loss is computed on
TEXT = Path(__file__).parents[1] / "docs" / "optimizer.md"

Tokens = Callable[[str], list[int]]
Samples = tuple[torch.Tensor, torch.Tensor]
"""Rows of tokens, and of labels: the same tokens, or NO_LOSS."""


def load(model: str | None) -> tuple[torch.nn.Module, Tokens, int]:
    """The model, what makes tokens of a text, and the token that ends an answer."""
    if model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        return AutoModelForCausalLM.from_pretrained(model), tokens, tokenizer.eos_token_id
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **small)), lambda text: list(text.encode()), 0


def of_text(text: str, tokens: Tokens) -> Samples:
    """Samples of `CONTEXT` tokens, all of which count."""
    row = torch.tensor(tokens(text))
    samples = row[: len(row) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return samples, samples


def of_instructions(lines: Iterable[str], tokens: Tokens, end: int) -> Samples:
    """A sample for each line: prompt, output and `end`, padded on the right. Labels of prompts and padding: NO_LOSS."""
    rows, labels = [], []
    for item in map(json.loads, filter(str.strip, lines)):
        given = f"### Input:\n{item['input']}\n\n" if item.get("input") else ""
        prompt = tokens(f"### Instruction:\n{item['instruction']}\n\n{given}### Response:\n")
        answer = [*tokens(item["output"]), end]
        rows.append((prompt + answer)[:LONGEST])
        labels.append(([NO_LOSS] * len(prompt) + answer)[:LONGEST])
    width = max(map(len, rows))
    return _padded(rows, end, width), _padded(labels, NO_LOSS, width)


def _padded(rows: list[list[int]], fill: int, width: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def loss_on(model: torch.nn.Module, samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of predicting each token that counts from those before it. exp(loss) is the perplexity.

    Padding is on the right, so no token that counts sees it.
    """
    return model(input_ids=samples, labels=labels).loss


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train; the loss on text that was held out, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder (default: a small one with random weights)")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text to learn")
    parser.add_argument("--instructions", type=Path, help="instructions and outputs to learn instead, JSON lines")
    parser.add_argument("--preset", nargs="*", default=["language_model_finetune"])
    parser.add_argument("--learning_rate", type=float, help="instead of the preset's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    wanted = parser.parse_args(argv)
    torch.manual_seed(0)

    base, tokens, end = load(wanted.model)
    if wanted.instructions is None:
        samples, labels = of_text(wanted.text.read_text(encoding="utf-8"), tokens)
    else:
        samples, labels = of_instructions(wanted.instructions.read_text(encoding="utf-8").splitlines(), tokens, end)
    few = min(16, len(samples) // 4)  # that are held out
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    arguments = preset_arguments(*wanted.preset)
    if wanted.learning_rate is not None:
        arguments["lr"] = wanted.learning_rate
    # with their names, by which it finds the LoRA pairs
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = CustomAdamW(trained, **arguments)
    warmup = round(0.05 * wanted.steps)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=wanted.steps)

    def held_out_loss() -> float:
        with torch.no_grad():
            return loss_on(model, samples[-few:], labels[-few:]).item()

    before = held_out_loss()
    for step in range(1, wanted.steps + 1):
        chosen = torch.randint(len(samples) - few, (wanted.batch_size,))
        loss = loss_on(model, samples[chosen], labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            decay = optimizer.get_optimization_info()["weight_decay"][0]
            print(f"step {step}: loss {loss.item():.4f}, weight decay {decay:.4f}")
    after = held_out_loss()
    print(f"held-out loss {before:.4f} before, {after:.4f} after; perplexity {math.exp(after):.1f}")
    return before, after


if __name__ == "__main__":
    main()
