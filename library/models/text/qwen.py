"""Qwen3 as a text encoder: its layers, and texts that are a user's turn of its chat."""

from __future__ import annotations

import re
from dataclasses import replace

from library.models.checkpoints.base_model import BaseModel
from library.models.checkpoints.part_files import own_tokenizer
from library.models.components import PartKind

LINEAR = re.compile(r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
"""The layers that adapters can sit on, and that a format is for."""
FROZEN = PartKind(
    folder="text_encoder",
    title="text encoder",
    new="library.models.modules.new_qwen3_encoder",
    linear=LINEAR,
    overflows_fp16=True,
)
"""Where it is never trained."""
BEFORE, BEHIND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""The words of its chat around a user's turn, up to the answer."""
WORDS = ("<|im_start|>", "<|im_end|>")
"""Those of them that are one token each."""
TOKENS_BEFORE = 3
"""Of Qwen3's own tokenizer, before the text."""


def with_own_tokenizer(base: BaseModel, path: str | None) -> BaseModel:
    """The model with the tokenizer that --qwen3_tokenizer_path names, if it does. UserError if there is none."""
    if not path:
        return base
    return replace(base, tokenizer=own_tokenizer(path, option="qwen3_tokenizer_path", inside="tokenizer"))
