"""Fine-tunes a language model on instructions: LoRA (transformers + peft) and CustomAdamW, with a preset's numbers.

    python examples/finetune_language_model.py
    python examples/finetune_language_model.py --model path/to/a/model --instructions my.jsonl --load_in_4bit

Without --model a small model with random weights is made, which learns --exercise in about a minute on a CPU: to write
four letters backwards, for words that it has never seen. docs/language-models.md explains the options and the data.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AdaLoraModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from fine_tuning import batches, instructions, leaks, optimizing, small_models
from fine_tuning.batches import NO_LOSS, Batch, Sample, prompt_ids, tensors
from fine_tuning.consolidation import Consolidation
from fine_tuning.instructions import Line, Tokenizer
from fine_tuning.language_models import ADAPTERS, DEVICE, check_adapter, load_base, load_tokenizer, with_adapter
from fine_tuning.optimizing import Optimizing
from library import rng
from library.errors import UserError, did_you_mean

# where nothing else was given, for a model with random weights, whose embeddings and head are trained as well
MADE = {"learning_rate": 5e-3, "batch_size": 32, "epochs": 8}
USUAL = {"batch_size": 8, "epochs": 3}


@dataclass(frozen=True)
class Quality:
    """Of held-out lines: the mean loss of a token of their answers, and the share of answers that are right to the
    letter, if the model writes the likeliest token each time; None where nothing was asked."""

    loss: float
    right: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def __str__(self) -> str:
        right = "" if self.right is None else f", {self.right:.1%} of the answers right"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{right}"


@dataclass(frozen=True)
class Result:
    """`earlier_before`, `earlier_after`: of the held-out part of --earlier; None without it."""

    before: Quality
    after: Quality
    earlier_before: Quality | None
    earlier_after: Quality | None
    model: Any


class Parts(NamedTuple):
    """Samples: to learn, held out; earlier ones to replay or to protect, and those of them that are held out."""

    new: list[Sample]
    new_held: list[Sample]
    earlier: list[Sample]
    earlier_held: list[Sample]


# -- measurements


def summed_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the losses of a batch's tokens that count, and their number. Each is predicted from those before it;
    exp(sum / number) is the perplexity."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS, reduction="sum")
    return total, int((labels != NO_LOSS).sum())


def mean_loss(model: Any, batch: Batch) -> Tensor:
    total, number = summed_loss(model, batch)
    return total / number


@torch.no_grad()
def measure(model: Any, tokenizer: Tokenizer, samples: Sequence[Sample], wanted: argparse.Namespace) -> Quality:
    total, number = 0.0, 0
    with rng.without_dropout(model):
        for start in range(0, len(samples), wanted.batch_size):
            batch = samples[start : start + wanted.batch_size]
            summed, count = summed_loss(model, tensors(batch, fill=tokenizer.pad_token_id, device=DEVICE))
            total, number = total + summed.item(), number + count
    asked = [sample for sample in samples if sample.prompt][: wanted.answers]
    expected = [tokenizer.decode(sample.tokens[sample.prompt :], skip_special_tokens=True) for sample in asked]
    written = answers(model, tokenizer, [sample.tokens[: sample.prompt] for sample in asked], wanted)
    right = sum(one.strip() == other.strip() for one, other in zip(written, expected, strict=True))
    return Quality(total / number, right / len(asked) if asked else None)


@torch.no_grad()
def answers(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], wanted: argparse.Namespace
) -> list[str]:
    """The likeliest token each time, until EOS or --max_new_tokens."""
    written = []
    with rng.without_dropout(model):
        for start in range(0, len(prompts), wanted.batch_size):
            some = prompts[start : start + wanted.batch_size]
            width = max(map(len, some))
            rows = [[tokenizer.pad_token_id] * (width - len(row)) + list(row) for row in some]
            mask = [[0] * (width - len(row)) + [1] * len(row) for row in some]
            found = model.generate(
                input_ids=torch.tensor(rows, device=DEVICE), attention_mask=torch.tensor(mask, device=DEVICE),
                max_new_tokens=wanted.max_new_tokens, do_sample=False, use_cache=True,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            written += tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return written


# -- training


def read(wanted: argparse.Namespace, tokenizer: Tokenizer) -> Parts:
    """The samples of --instructions, or of --exercise, and of --earlier."""
    if wanted.instructions is None:
        made = enumerate(small_models.instructions(wanted.exercise), 1)
        lines = [
            instructions.read_line(line, tokenizer, place=f"{wanted.exercise}, {number}", as_chat=wanted.as_chat)
            for number, line in made
        ]
    else:
        lines = instructions.read_lines(wanted.instructions, tokenizer, as_chat=wanted.as_chat)
    earlier = instructions.read_lines(wanted.earlier, tokenizer, as_chat=wanted.as_chat) if wanted.earlier else []
    # both together, so that no held-out line is replayed
    _, held = leaks.split([*lines, *earlier], wanted.held_out, seed=wanted.seed)
    out = set(map(id, held))

    def samples(name: str, some: list[Line], *, held_out: bool) -> list[Sample]:
        chosen = [line for line in some if (id(line) in out) == held_out]
        found, told = batches.encode(chosen, tokenizer, longest=wanted.max_length)
        print(f"{name}: {told}")
        if not found:
            raise UserError(f"{name}: no sample is left of {len(chosen)} lines; give more, or a larger --max_length")
        return found

    new = samples("to learn", lines, held_out=False), samples("held out", lines, held_out=True)
    if not earlier:
        return Parts(*new, [], [])
    old = samples("earlier", earlier, held_out=False), samples("earlier, held out", earlier, held_out=True)
    return Parts(*new, *old)


def stream(parts: Parts, wanted: argparse.Namespace) -> Iterator[list[Sample]]:
    """Batches without an end, epoch after epoch."""
    for epoch in itertools.count():
        mixed = batches.mixed(parts.new, parts.earlier, wanted.replay or 0, seed=wanted.seed, epoch=epoch)
        yield from batches.batches(mixed, wanted.batch_size, seed=wanted.seed, epoch=epoch)


def steps_of(parts: Parts, wanted: argparse.Namespace) -> int:
    an_epoch = len(batches.mixed(parts.new, parts.earlier, wanted.replay or 0, seed=wanted.seed, epoch=0))
    return wanted.steps or math.ceil(wanted.epochs * math.ceil(an_epoch / wanted.batch_size) / wanted.accumulation)


def protection(model: Any, trained: list[Tensor], parts: Parts, wanted: argparse.Namespace, fill: int) -> Consolidation:
    """Elastic weight consolidation, measured on up to 200 of the earlier samples."""
    ewc = Consolidation(trained, wanted.ewc)
    some = rng.python_random("ewc", wanted.seed).sample(parts.earlier, min(len(parts.earlier), 200))
    with rng.without_dropout(model):
        ewc.measure(mean_loss(model, tensors([sample], fill=fill, device=DEVICE)) for sample in some)
    return ewc


def learn(
    model: Any, coming: Iterator[Batch], own: Optimizing, ewc: Consolidation | None, *, steps: int, accumulation: int
) -> None:
    """Steps whose loss is the mean over all tokens that count in `accumulation` batches."""
    model.train()
    for step in range(1, steps + 1):
        some = list(itertools.islice(coming, accumulation))
        counts = [int((batch["labels"][:, 1:] != NO_LOSS).sum()) for batch in some]
        total = 0.0
        for batch, count in zip(some, counts, strict=True):
            loss = model(**batch).loss * count / sum(counts)  # with AdaLoRA's penalty
            loss.backward()
            total += loss.item()
        if ewc is not None:
            ewc.add_gradients()
        own.step()
        if isinstance(model.base_model, AdaLoraModel):
            model.base_model.update_and_allocate(step)  # moves its budget of ranks, by the gradients
        own.optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {total:.4f}, weight decay {own.weight_decay():.4f}", flush=True)


def train(wanted: argparse.Namespace) -> Result:
    """Reads, measures, trains, measures again, saves. Raises UserError."""
    check(wanted)
    tokenizer = load_tokenizer(wanted.model)
    fill = tokenizer.pad_token_id
    parts = read(wanted, tokenizer)
    asked = [prompt_ids(prompt, tokenizer, as_chat=wanted.as_chat) for prompt in wanted.prompts]
    base = load_base(wanted.model, len(tokenizer), in_4bit=wanted.load_in_4bit, checkpointing=wanted.checkpointing)
    size, steps = base.num_parameters(), steps_of(parts, wanted)
    torch.manual_seed(wanted.seed)
    model = with_adapter(base, wanted, steps=steps)
    print(optimizing.trained_share(model, of=size))
    own = optimizing.make(model, wanted, parameters=size, steps=steps, scheduler="cosine")

    def measured() -> tuple[Quality, Quality | None, list[str]]:
        earlier = measure(model, tokenizer, parts.earlier_held, wanted) if parts.earlier_held else None
        return measure(model, tokenizer, parts.new_held, wanted), earlier, answers(model, tokenizer, asked, wanted)

    before, earlier_before, answers_before = measured()
    ewc = None if wanted.ewc is None else protection(model, own.trained, parts, wanted, fill)
    coming = (tensors(batch, fill=fill, device=DEVICE) for batch in stream(parts, wanted))
    learn(model, coming, own, ewc, steps=steps, accumulation=wanted.accumulation)
    after, earlier_after, answers_after = measured()

    for prompt, *both in zip(wanted.prompts, answers_before, answers_after, strict=True):
        print(f"{prompt}\n  before: {both[0]!r}\n  after:  {both[1]!r}")
    if ewc is not None:
        print(f"EWC: the penalty at the end is {ewc.penalty():.3g}")
    print(f"held out, before: {before}\nheld out, after:  {after}")
    if earlier_before is not None:
        print(f"earlier, before:  {earlier_before}\nearlier, after:   {earlier_after}")
    print(own.memory())
    if wanted.save_to is not None:
        model.save_pretrained(wanted.save_to, save_embedding_layers=False)
        tokenizer.save_pretrained(wanted.save_to)
        print(f"the adapter is in {wanted.save_to}")
    return Result(before, after, earlier_before, earlier_after, model)


# -- options


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_least_zero, at_least_one = optimizing.at_least_zero, optimizing.at_least_one
    share, part = optimizing.share, optimizing.share_above_zero
    parser.add_argument("--model", help="a model's folder or name (default: a small one with random weights)")
    parser.add_argument("--load_in_4bit", action="store_true", help="hold the base in nf4 (QLoRA)")
    parser.add_argument("--checkpointing", action="store_true", help="keep fewer activations, for more time")
    group = parser.add_argument_group("data")
    group.add_argument("--instructions", type=Path, help="JSON lines to learn")
    group.add_argument("--exercise", help=f"learnt instead: {', '.join(small_models.TASKS)} (default: reverse)")
    group.add_argument("--as_chat", action="store_true", help="render instructions by the model's chat template")
    group.add_argument("--max_length", type=at_least_one, default=512, help="tokens of a prompt with its answer")
    group.add_argument("--held_out", type=part, default=0.1, help="share of the lines that is not learnt (0.1)")
    group.add_argument("--prompts", nargs="*", default=[], help="instructions to answer before and after")
    group.add_argument("--answers", type=at_least_zero, default=200, help="held-out lines to answer, at most")
    group.add_argument("--max_new_tokens", type=at_least_one, default=64)
    group = parser.add_argument_group("adapter")
    group.add_argument("--adapter", help=f"{', '.join(ADAPTERS)} (default: lora)")
    group.add_argument("--rank", type=at_least_one, help="16; AdaLoRA ends at half of it")
    group.add_argument("--alpha", type=optimizing.above_zero, help="twice the rank")
    group.add_argument("--dropout", type=share, help="0.05")
    group.add_argument("--target_modules", nargs="+", help="last parts of layers' names (default: all linear ones)")
    group.add_argument("--start_from", type=Path, help="an adapter's folder, to go on with")
    group.add_argument("--save_to", type=Path, help="a new folder for the adapter")
    group = parser.add_argument_group("against forgetting")
    group.add_argument("--earlier", type=Path, help="JSON lines that were learnt before, or should not be forgotten")
    group.add_argument("--replay", type=share, help="share of --earlier in all samples, as 0.3")
    group.add_argument("--ewc", type=optimizing.above_zero, help="strength of elastic weight consolidation")
    optimizing.add_optimizer_options(parser, preset="language_model_finetune", task="generation")
    parser.add_argument("--accumulation", type=at_least_one, default=1, help="batches of a step")
    return optimizing.parsed(parser, argv)


def check(wanted: argparse.Namespace) -> None:
    """Raises UserError for what is wrong in the options, and sets those that were not given."""
    optimizing.check_optimizer_options(wanted)
    if wanted.exercise is not None and wanted.instructions is not None:
        raise UserError("--exercise: has no effect with --instructions; give one of them")
    of_adapter = {"adapter": "lora", "rank": 16, "dropout": 0.05}
    if wanted.start_from is not None:
        given = [name for name in (*of_adapter, "alpha", "target_modules") if getattr(wanted, name) is not None]
        if given:
            raise UserError(f"--{given[0]}: the adapter of --start_from has its own")
        check_adapter(wanted.start_from)
    optimizing.fill(wanted, {"exercise": "reverse"} | of_adapter | (MADE if wanted.model is None else USUAL))
    optimizing.fill(wanted, {"alpha": 2 * wanted.rank})
    if wanted.adapter not in ADAPTERS:
        hint = did_you_mean(wanted.adapter, ADAPTERS) or f"; there are {', '.join(ADAPTERS)}"
        raise UserError(f"--adapter: no '{wanted.adapter}'{hint}")
    for name in ("replay", "ewc"):
        if getattr(wanted, name) and wanted.earlier is None:
            raise UserError(f"--{name}: needs --earlier, the lines not to forget")
    optimizing.make_folder(wanted.save_to)


def main(argv: list[str] | None = None) -> int:
    return optimizing.ended(lambda: train(options(argv)))


if __name__ == "__main__":
    sys.exit(main())
