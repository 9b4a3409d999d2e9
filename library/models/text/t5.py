"""Captions for T5, in the models that read always the same number of its states: FLUX.1 and Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.files.json_text import Config
from library.gpu import device_of, to_device

if TYPE_CHECKING:
    from library.models.modules import Tokenizer


@dataclass(frozen=True)
class T5Captions:
    """tokenizer: T5's. config: of its encoder. tokens: of a caption, the one that ends it and padding included."""

    tokenizer: Tokenizer
    config: Config
    tokens: int

    def content(self, caption: str) -> list[int]:
        """The tokens of a caption without the end, however many there are."""
        ids: list[int] = self.tokenizer.encode(caption).ids
        return ids[:-1] if ids and ids[-1] == self._end else ids

    def ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and a mask that is 0 on padding, each [B, tokens]."""
        rows = [[*self.content(caption)[: self.tokens - 1], self._end] for caption in captions]
        pad, lengths = self.config.get("pad_token_id", 0), torch.tensor([len(row) for row in rows])
        ids = torch.tensor([[*row, *[pad] * (self.tokens - len(row))] for row in rows])
        return ids, (torch.arange(self.tokens) < lengths[:, None]).long()

    def states(self, encoder: Any, captions: Sequence[str], *, masked: bool) -> tuple[Tensor, Tensor]:
        """The states [B, tokens, D] of the frozen encoder, and the mask. masked: padding is hidden from the texts."""
        ids, mask = (to_device(table, device_of(encoder)) for table in self.ids(captions))
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):  # it overflows fp16
            return encoder(ids, attention_mask=mask if masked else None).last_hidden_state, mask

    @property
    def _end(self) -> int:
        return int(self.config.get("eos_token_id", 1))
