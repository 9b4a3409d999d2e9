"""Makes tokens of lines, and batches of samples of about equal length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fine_tuning.instructions import Line, Tokenizer, chat_prompt, instruct
from library import rng

Batch = dict[str, torch.Tensor]

NO_LOSS = -100
"""The label of tokens that no loss is computed on."""


@dataclass(frozen=True)
class Sample:
    """The tokens of a turn, of which the first `prompt` have no loss."""

    tokens: tuple[int, ...]
    prompt: int


def encode(lines: Iterable[Line], tokenizer: Tokenizer, *, longest: int) -> tuple[list[Sample], str]:
    """A sample for each turn, its answer ended by EOS, cut at `longest` tokens; and in words what was cut.

    A cut answer has no EOS: the model is not to stop in the middle. Turns whose prompt fills all tokens are left out.
    """
    turns = [(line, turn) for line in lines for turn in line.turns]
    samples, cut = [], 0
    for line, turn in turns:
        prompt = [*([] if line.chat else _first(tokenizer)), *token_ids(turn.prompt, tokenizer)]
        answer = token_ids(turn.answer, tokenizer)
        answer += [tokenizer.eos_token_id] * (answer[-1:] != [tokenizer.eos_token_id])
        cut += len(prompt) + len(answer) > longest
        if max(len(prompt), 1) < longest:  # the first token has no loss, as nothing is before it
            samples.append(Sample((*prompt, *answer)[:longest], len(prompt)))
    told, lost = f"{len(turns)} answers, {cut} of them cut at {longest} tokens", len(turns) - len(samples)
    return samples, f"{told}, {lost} left out because their prompts are as long as that" if lost else told


def token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Without special tokens but those that are in the text."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def prompt_ids(instruction: str, tokenizer: Tokenizer, *, as_chat: bool) -> list[int]:
    """What the model is given to answer an instruction. Raises UserError for a tokenizer without a chat template."""
    if as_chat:
        messages = [{"role": "user", "content": instruction}]
        return token_ids(chat_prompt(messages, tokenizer, "--as_chat"), tokenizer)
    return [*_first(tokenizer), *token_ids(instruct(instruction), tokenizer)]


def _first(tokenizer: Tokenizer) -> list[int]:
    """The token that begins every text, for tokenizers that have one and set it."""
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]


def mixed(new: Sequence[Sample], earlier: Sequence[Sample], share: float, *, seed: int, epoch: int) -> list[Sample]:
    """The new samples, and so many drawn from the earlier ones that these are `share` of all.

    Drawn without repetition, unless there are too few: then all of them as often as the rest allows.
    """
    wanted = round(len(new) * share / (1 - share)) if earlier else 0
    draws = rng.python_random("replay", seed, epoch)
    drawn: list[Sample] = []
    while len(drawn) < wanted:
        drawn += draws.sample(list(earlier), min(len(earlier), wanted - len(drawn)))
    return [*new, *drawn]


def batches(samples: Sequence[Sample], size: int, *, seed: int, epoch: int) -> list[list[Sample]]:
    """All samples in a random order, those of a batch of about equal length: sorted within 50 batches at a time."""
    draws = rng.python_random("batches", seed, epoch)
    order = list(samples)
    draws.shuffle(order)
    found = []
    for start in range(0, len(order), 50 * size):
        alike = sorted(order[start : start + 50 * size], key=lambda sample: len(sample.tokens))
        found += [alike[at : at + size] for at in range(0, len(alike), size)]
    draws.shuffle(found)
    return found


def tensors(batch: Sequence[Sample], *, fill: int, device: torch.device | str = "cpu") -> Batch:
    """input_ids, attention_mask and labels of a batch, padded on the right."""
    width = max(len(sample.tokens) for sample in batch)
    rows = [[*sample.tokens, *[fill] * (width - len(sample.tokens))] for sample in batch]
    masks = [[1] * len(sample.tokens) + [0] * (width - len(sample.tokens)) for sample in batch]
    labels = [
        [*[NO_LOSS] * sample.prompt, *sample.tokens[sample.prompt :], *[NO_LOSS] * (width - len(sample.tokens))]
        for sample in batch
    ]
    named = {"input_ids": rows, "attention_mask": masks, "labels": labels}
    return {name: torch.tensor(values, device=device) for name, values in named.items()}
