"""T5-XXL as a text encoder: a caption's tokens as tables, and their states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files.json_text import Config
from library.models.components import PartKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.models.modules import Tokenizer

T5 = PartKind(
    folder="text_encoder_2",
    title="text encoder T5",
    new="library.models.modules.new_t5_encoder",
    linear=re.compile(r"encoder\.block\.\d+\.layer\.(?:0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(?:wi_[01]|wi|wo))"),
    overflows_fp16=True,
)
"""The part. It is never trained."""


class T5Tokens:
    """T5's tokens of captions.

    folder: with its tokenizer.json; None where there is none. config: of the encoder. limit: the most tokens of a text,
    with the one that ends it. of: the path of the base model, for messages.
    """

    def __init__(self, folder: Path | None, config: Config, *, limit: int, of: str) -> None:
        self.folder, self.limit = folder, limit
        self._end, self._pad, self._of = config.get("eos_token_id", 1), config.get("pad_token_id", 0), of

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from library.models.modules import read_fast_tokenizer

        return read_fast_tokenizer(self._existing())

    def _existing(self) -> Path:
        if self.folder is None:
            raise UserError(
                f"{self._of} has no tokenizer of T5 beside it: give --t5_tokenizer_path, a folder with the "
                "tokenizer.json of google/t5-v1_1-xxl, such as the folder tokenizer_2 of FLUX.1 on the hub"
            )
        return self.folder

    def content(self, caption: str) -> list[int]:
        """Those of a caption without the end."""
        ids: list[int] = self._tokenizer.encode(caption).ids
        return ids[:-1] if ids and ids[-1] == self._end else ids

    def fingerprint(self) -> str:
        """A hash of the tokenizer."""
        from library.models.fingerprint import folder_fingerprint

        return folder_fingerprint(self._existing())

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Those of each caption, cut off, with the end."""
        return [[*self.content(caption)[: self.limit - 1], self._end] for caption in captions]

    def table(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        """Token ids, padded, and a mask that is 0 on padding, each [B, length]."""
        import torch

        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([[*row, *[self._pad] * (length - len(row))] for row in rows])
        return ids, (torch.arange(length) < lengths[:, None]).long()


def t5_states(encoder: nn.Module, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The states of a frozen T5 behind its last norm, [B, L, D], without autocast: fp16 is too small for them."""
    import torch

    called: Any = encoder
    with torch.no_grad(), torch.autocast(ids_BL.device.type, enabled=False):
        states: Tensor = called(ids_BL, attention_mask=mask_BL).last_hidden_state
    return states
