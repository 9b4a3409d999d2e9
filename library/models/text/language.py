"""Language models as text encoders: Qwen3's tokenizer, its tokens as tables, and the precision that they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.models.modules import Tokenizer


def read_own_tokenizer(
    folder: Path | None, *, option: str, title: str, source: str, of: str, model: str, rows: int
) -> Tokenizer:
    """The tokenizer in a folder. UserError if there is no folder, with the option that names one and the `source` on
    the hub, or if it has more tokens than the model's table has rows. title: "Qwen3". of: the path of the base model.
    """
    from library.models.modules import read_fast_tokenizer

    if folder is None:
        raise UserError(
            f"{of} has no tokenizer of {title} beside it: give --{option}, a folder with the tokenizer.json of "
            f"{source} on the hub"
        )
    found = read_fast_tokenizer(folder)
    if (tokens := found.get_vocab_size()) > rows:
        raise UserError(f"{folder} is not the tokenizer of {title}: it has {tokens} tokens, and {model} {rows}")
    return found


def read_qwen3_tokenizer(
    folder: Path, *, source: str, of: str, model: str, rows: int, words: Sequence[str] = ()
) -> Tokenizer:
    """Qwen3's, as `read_own_tokenizer`; `Path()` where there is none. UserError for one that ends each text, or that
    splits one of these `words` of the chat into letters, as one without its file of added tokens does."""
    own = {"option": "qwen3_tokenizer_path", "title": "Qwen3", "source": source, "of": of, "model": model}
    found = read_own_tokenizer(None if folder == Path() else folder, rows=rows, **own)
    if found.encode("").ids:
        raise UserError(f"{folder} is not the tokenizer of Qwen3: it adds tokens to every text, as T5's does")
    if split := [word for word in words if found.token_to_id(word) is None]:
        raise UserError(
            f"{folder} is not the whole tokenizer of Qwen3: {', '.join(split)} is no token of it; tokenizer.json of "
            f"{source} on the hub has all"
        )
    return found


def padded(rows: Sequence[Sequence[int]], *, with_id: int = 0, length: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids with those of padding behind them, and a mask that is 0 there, each [B, longest], or of `length` if
    that is longer."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    longest = max(length, int(lengths.max()))
    ids = torch.tensor([[*row, *[with_id] * (longest - len(row))] for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


@contextmanager
def never_in_fp16(device: torch.device) -> Iterator[bool]:
    """A context in which autocast, where it is on, computes in bf16: fp16 is too small for these. Gives whether it is
    on."""
    import torch

    mixed = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        yield mixed
