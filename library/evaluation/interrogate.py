"""The command `interrogate`: the tokens that a LoRA changes most in the text encoders."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read, run
from library.config.fields import option
from library.config.options import ModelOptions
from library.errors import UserError
from library.evaluation.candidates import Candidate, read_candidates
from library.evaluation.precision import PrecisionOptions

if TYPE_CHECKING:
    from library.evaluation.base_model import BaseModel

DESCRIPTION = """\
Encodes every token of the vocabulary alone, without the LoRA and with it, and prints those whose states differ most:
the trigger word of a LoRA that trained the text encoders is often among them."""


@dataclass(frozen=True, kw_only=True)
class InterrogateOptions:
    """What is compared"""

    batch_size: int = option(256, minimum=1, help="tokens at once")
    top: int = option(30, minimum=1, help="tokens that are printed")


COMMAND = Command(
    name="lora-tools interrogate",
    description=DESCRIPTION,
    groups={"interrogate": InterrogateOptions, "model": ModelOptions, "precision": PrecisionOptions},
    words=(Word("LORA", "a LoRA file; with a multiplier: a.safetensors:0.7"),),
)


@dataclass(frozen=True)
class Change:
    """A token, and the mean absolute change of its states."""

    token: int
    text: str
    change: float


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options: InterrogateOptions = given.groups["interrogate"]
    (candidate,) = read_candidates(given.words)
    from library.evaluation.base_model import BaseModel, open_base

    model, precision = given.groups["model"], given.groups["precision"]
    family = open_base(model, [candidate], given=given.given)
    base = BaseModel.of(family, precision, no_half_vae=model.no_half_vae)
    found = changes(base, candidate, batch_size=options.batch_size)
    for line in table(found, top=options.top):
        print(line)
    return 0


def changes(base: BaseModel, candidate: Candidate, *, batch_size: int) -> list[Change]:
    """Every token, the most changed first. UserError for files without layers in the text encoders."""
    import torch

    from library.progress import progress

    encoders = tuple(base.family.components.text_encoders)
    if not base.acts_on(candidate, *encoders):
        raise UserError(
            f"{candidate.name}: has no layers in the text encoders, so that it changes no token there. Its trigger "
            "word, if it has one, was learnt by the denoiser: `inspect` shows what the metadata say"
        )
    texts, found = base.family.vocabulary(), list[float]()
    base.load(*encoders)
    with torch.no_grad(), base.autocast(), progress(desc="tokens", total=len(texts), unit="token") as bar:
        for first in range(0, len(texts), batch_size):
            tokens = range(first, min(first + batch_size, len(texts)))
            before = base.family.token_states(tokens).float()
            with base.adapted(candidate, *encoders):
                after = base.family.token_states(tokens).float()
            found += (after - before).abs().mean(dim=(1, 2)).tolist()
            bar.update(len(tokens))
    base.release(*encoders)
    order = sorted(range(len(texts)), key=lambda token: -found[token])
    return [Change(token, texts[token], found[token]) for token in order]


def table(found: Sequence[Change], *, top: int) -> Iterator[str]:
    """The most changed tokens, each with its change as a multiple of the median token's."""
    median = found[len(found) // 2].change
    yield f"mean change of the states of one token: {median:.5f} for the median of {len(found)}; the most changed:"
    for one in found[:top]:
        times = f"{one.change / median:.2f} ×" if median else ""
        yield f"{one.token:>6}  {one.text:<20} {one.change:.5f}  {times}".rstrip()


if __name__ == "__main__":
    sys.exit(run(main))
