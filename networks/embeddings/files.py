"""Embedding files of kohya's scripts, A1111, diffusers and OneTrainer, and embeddings inside LoRA files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.files.index import read_index
from library.models.checkpoints.adapter_file import is_of_embedding
from library.models.checkpoints.detect import kind_of_file
from networks.files import read_tensors

logger = logging.getLogger(__name__)

_BUNDLE = "bundle_emb"
_WEB_UI = "string_to_param"  # A1111's table in a pickle: {"*": tensor}
_OF_XL = ("clip_l", "clip_g")
_NO_WORDS = ("emb_params", *_OF_XL, "*", f"{_WEB_UI}.*")  # names of tensors, where diffusers has the word


def bundled(word: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An embedding's tensors under the names that they have in a LoRA file, which A1111 reads."""
    return {f"{_BUNDLE}.{word}.{key}": tensor for key, tensor in tensors.items()}


def is_embedding(path: Path) -> bool:
    """Whether a file holds an embedding and nothing else, by its header."""
    return kind_of_file(read_index(path)).kind == "embedding"


def words(path: Path) -> tuple[str, ...]:
    """The words of the embeddings in a file, by its header; none: it has no embedding.

    A LoRA file names them. An embedding's word is that of its metadata or, in a file of diffusers, the tensor's name;
    else the file's name, as A1111 has it.
    """
    index = read_index(path)
    if bundles := [name for name in index.entries if is_of_embedding(name)]:
        return tuple(dict.fromkeys(name.split(".", 2)[1] for name in bundles))
    if kind_of_file(index).kind != "embedding":
        return ()
    (first, *more) = index.entries
    named = [] if more or first in _NO_WORDS else [first]
    stated = index.metadata.get("ss_token_string")
    return (stated or next(iter(named), path.stem),)


def read(
    path: Path, *, word: str, widths: Mapping[str, int], where: str, vectors: int | None = None
) -> dict[str, Tensor]:
    """The vectors of a file, [vectors, width] each, fp32, by the names of `widths`.

    widths: how many numbers a vector has in each of the model's tables. where: the file, and the option that names it,
    for messages. vectors: how many there must be; None: any number. `UserError` if it holds no embedding, one for
    another model, or one of another number of vectors.
    """
    found = _of_our_word(_tensors(path, where), word, where)
    if len(widths) == 1 and len(found) == 1:
        (key,), (tensor,) = widths, found.values()
        found = {key: tensor}  # A1111's and diffusers' files have other names
    if missing := [key for key in widths if key not in found]:
        raise UserError(
            f"{where}: has no {' and '.join(missing)}, but {', '.join(found)}: it is "
            + ("an embedding for SDXL" if set(found) & set(_OF_XL) else "an embedding for Stable Diffusion 1.x or 2.x")
        )
    checked = {key: _checked(found[key], width, vectors, where) for key, width in widths.items()}
    if len({len(tensor) for tensor in checked.values()}) > 1:
        counts = ", ".join(f"{key} {len(tensor)}" for key, tensor in checked.items())
        raise UserError(f"{where}: its text encoders have different numbers of vectors: {counts}")
    return checked


def _tensors(path: Path, where: str) -> dict[str, Tensor]:
    index = read_index(path)
    if any(name.startswith(f"{_WEB_UI}.") for name in index.entries):
        table = torch.load(path, map_location="cpu", weights_only=True)[_WEB_UI]
        return {name: tensor.detach() for name, tensor in table.items()}
    if not any(map(is_of_embedding, index.entries)) and (kind := kind_of_file(index)).kind != "embedding":
        raise UserError(f"{where} is {kind.title}, and no embedding")
    return read_tensors(path)


def _of_our_word(tensors: Mapping[str, Tensor], word: str, where: str) -> dict[str, Tensor]:
    """The tensors of an embedding file, or those that a LoRA file has for this word, or for its only word."""
    words: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if is_of_embedding(name):
            _, own, key = name.split(".", 2)
            words.setdefault(own, {})[key] = tensor
    if not words:
        return dict(tensors)
    chosen = word if word in words else next(iter(words))
    if chosen != word and len(words) > 1:
        raise UserError(f"{where}: has embeddings of {', '.join(words)}, and none of {word}")
    if chosen != word:
        logger.info("%s: the embedding of %s is the beginning of that of %s", where, chosen, word)
    return words[chosen]


def _checked(tensor: Tensor, width: int, vectors: int | None, where: str) -> Tensor:
    rows = tensor.float().reshape(1, -1) if tensor.dim() == 1 else tensor.float()
    if rows.dim() != 2 or rows.shape[1] != width:
        raise UserError(
            f"{where}: its vectors have {rows.shape[-1]} numbers, and those of this model's text encoder {width}: it "
            "is for another base model"
        )
    if vectors is not None and len(rows) != vectors:
        raise UserError(
            f"{where}: has {len(rows)} vectors, and --num_vectors_per_token is {vectors}: give "
            f"--num_vectors_per_token {len(rows)}"
        )
    return rows
