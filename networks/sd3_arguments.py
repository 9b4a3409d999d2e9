"""kohya's words for adapters of Stable Diffusion 3: `--network_module networks.lora_sd3` takes them as arguments.

Ranks by kind of layer become patterns of the layers' names, as `networks.layers` and `networks.ranks` have them.
Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from library.config import registry
from library.errors import UserError

logger = logging.getLogger(__name__)

MODULE = "networks.lora_sd3"
_OF_KIND = {
    f"{stream}_{word}_dim": rf".*\.{stream}_block\.{layer}\..*"
    for stream in ("context", "x")
    for word, layer in (("attn", "attn2?"), ("mlp", "mlp"), ("mod", "adaLN_modulation"))
}
"""The layers of each kind, by kohya's word for their rank."""
_EMBEDDERS = (
    *(rf"{name}_embedder(?:\..*)?" for name in ("context", "t", "x", "y")),
    r"final_layer\.adaLN_modulation\..*",
    r"final_layer\.linear",
)
"""The layers that the numbers of emb_dims are for."""
_OURS = ("network_reg_dims", "exclude_patterns", "include_patterns", "preset")
_FALSE = ("false", "0", "none", "")


def translate(words: Iterable[str]) -> list[str]:
    """The words for our kind. Raises UserError."""
    given = registry.split_words(tuple(words), where="--network_args")
    for name in ("split_qkv", "train_t5xxl", "verbose"):
        if name == "verbose" or given.get(name, "").lower() in _FALSE:
            given.pop(name, None)
    ranks = {pattern: _rank(name, given.pop(name)) for name, pattern in _OF_KIND.items() if name in given}
    embedders = _embedders(given.pop("emb_dims", ""))
    ranks |= embedders
    if ranks and (beside := [name for name in _OURS if name in given]):
        raise UserError(
            f"--network_args: {beside[0]} and kohya's ranks by kind of layer each choose layers and ranks: give one of "
            "them"
        )
    if embedders:
        given["preset"] = "full"
    if with_rank := [f"{pattern}={rank}" for pattern, rank in ranks.items() if rank]:
        given["network_reg_dims"] = ",".join(with_rank)
    if without := [pattern for pattern, rank in ranks.items() if not rank]:
        given["exclude_patterns"] = repr(without)
    return [f"{name}={text}" for name, text in given.items()]


def _embedders(text: str) -> dict[str, int]:
    """The rank of each embedder, by its pattern; empty if none is adapted."""
    text = text.strip().removeprefix("[").removesuffix("]")
    if not text:
        return {}
    numbers = [_rank("emb_dims", word) for word in text.split(",")]
    if len(numbers) != len(_EMBEDDERS):
        raise UserError(
            f"--network_args: emb_dims={text}: {len(numbers)} numbers, and there are {len(_EMBEDDERS)} layers: "
            "context, t, x and y embedder, final modulation, final linear"
        )
    return dict(zip(_EMBEDDERS, numbers, strict=True)) if any(numbers) else {}


def _rank(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(
            f"--network_args: {name}={text}: {text.strip()} is no rank, which is a whole number, 0 for none"
        )
    return int(text)
