"""Qwen3, the text encoder of several models, on disk: a folder as transformers writes one, or a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from library.files.json_text import Config
from library.files.tensors import TensorEntry
from library.models.checkpoints.base_model import Part
from library.models.checkpoints.part_files import Entries, PartFiles
from library.models.checkpoints.shapes import count_of, shape_of

_TITLE = "text encoder Qwen3"
_MARK = "layers.0.self_attn.q_norm.weight"


def qwen3_files(noun: str, usual: Callable[[], Config], *, prefixes: tuple[str, ...] = ("",)) -> PartFiles:
    """The part of a model with one of the sizes of Qwen3. usual: the configuration of that size, of which a file's
    shapes change what they tell. noun, prefixes: as `PartFiles` has them."""
    return PartFiles(
        folder="text_encoder",
        title=_TITLE,
        in_folder=lambda entries, config: _layers_alone(entries),
        noun=noun,
        marks=(f"model.{_MARK}", _MARK),
        prefixes=prefixes,
        read=lambda entries, path: qwen3_of_file(entries, path, usual=usual()),
        has_tokenizer=True,
    )


def qwen3_of_file(entries: Entries, path: str, *, usual: Config) -> Part:
    """The part in a file, whatever its size."""
    found = _layers_alone(entries)
    vocabulary, width = shape_of(found, "embed_tokens.weight", path)
    (head,) = shape_of(found, _MARK, path)
    queries, keys = (shape_of(found, f"layers.0.self_attn.{name}_proj.weight", path)[0] for name in "qk")
    config: dict[str, Any] = {
        **usual,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(found, "layers.0.mlp.gate_proj.weight", path)[0],
        "num_hidden_layers": count_of(found, "layers"),
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
    }
    return Part(config, f"the {_TITLE} in {path}", lambda: found)


def _layers_alone(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Without the head that predicts words."""
    return {name.removeprefix("model."): e for name, e in entries.items() if not name.startswith("lm_head.")}
