"""Small models with random weights, and tasks that they learn in a minute on a CPU: what the examples train without
a model or data of yours.

    python examples/fine_tuning/small_models.py reverse > reverse.jsonl     # 2,000 instructions
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from library import rng
from library.errors import UserError, did_you_mean

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {
    "reverse": ("Reverse the letters: ", lambda word: word[::-1]),
    "sort": ("Sort the letters: ", lambda word: "".join(sorted(word))),
    "double": ("Write each letter twice: ", lambda word: "".join(letter * 2 for letter in word)),
}
"""Task → its instruction before a word of four letters, and the answer."""

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = 0.1
"""The standard deviation of the frozen weights, five times the usual: at 0.02 some seeds learn nothing."""

SHAPES = ("square", "circle", "cross", "frame")
_TURN = "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
_CHAT = (
    f"{{% for message in messages %}}{_TURN}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)


# -- language


def instructions(task: str, count: int = 2000, *, seed: int = 0) -> list[str]:
    """JSON lines of a task, no two alike. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(f"no task '{task}'{did_you_mean(task, TASKS) or '; there are ' + ', '.join(TASKS)}")
    before, answer = TASKS[task]
    draws = rng.python_random("instructions", task, seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draws.choices(LETTERS, k=4))] = None
    return [json.dumps({"instruction": before + word, "output": answer(word)}) for word in words]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, but the fixed words of templates and tasks are one token each, so that samples are short."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    fixed = ["### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n", *(before for before, _ in TASKS.values())]
    made.add_tokens([AddedToken(word, normalized=False) for word in fixed])
    made.chat_template = _CHAT
    return made


def language_model(words: int) -> LlamaForCausalLM:
    """A Llama of 2 layers for a vocabulary of so many tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, tie_word_embeddings=False, initializer_range=SPREAD, **SMALL))


# -- images


def vision_transformer(classes: list[str]) -> ViTForImageClassification:
    """A ViT of 2 layers for images of 32 × 32 pixels."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": len(classes)}
    return ViTForImageClassification(ViTConfig(initializer_range=SPREAD, **sizes, **SMALL))


def shapes(count: int, *, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Bright shapes on dark ground, of any size, place and colours, with noise: pixels in [-1, 1], [count, 3, 32, 32],
    and their names."""
    draws = rng.torch_generator("shapes", seed)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    pixels, names = [], []
    for number in range(count):
        half, down, right = (
            torch.rand(3, generator=draws) * torch.tensor([3, 8, 8]) + torch.tensor([7, 12, 12])
        ).tolist()
        y, x = (rows - down).abs() / half, (columns - right).abs() / half
        name = SHAPES[number % len(SHAPES)]
        inside = _inside(name, y, x)
        ink, paper = torch.rand(3, 1, 1, generator=draws), -torch.rand(3, 1, 1, generator=draws)
        noise = 0.1 * torch.randn(3, 32, 32, generator=draws)
        pixels.append((torch.where(inside, ink, paper) + noise).clamp(-1, 1))
        names.append(name)
    return torch.stack(pixels), names


def _inside(name: str, y: Tensor, x: Tensor) -> Tensor:
    """Which pixels a shape covers, from their distances to its middle in halves of its size."""
    square = (y <= 1) & (x <= 1)
    parts: dict[str, Any] = {
        "square": square,
        "circle": y**2 + x**2 <= 1,
        "cross": square & ((y <= 0.33) | (x <= 0.33)),
        "frame": square & ((y > 0.6) | (x > 0.6)),
    }
    return parts[name]


def main(words: list[str]) -> int:
    try:
        (task,) = words or [""]
        print("\n".join(instructions(task)))
    except (UserError, ValueError) as error:
        print(f"error: {error}" if isinstance(error, UserError) else __doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
