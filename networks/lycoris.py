"""LyCORIS' words for our own kinds: `--network_module networks.lycoris` takes what `lycoris.kohya` takes.

`algo` names the kind; its other arguments become those of the kind, with LyCORIS' defaults where they differ from ours.
Imports no torch. `lycoris.kohya` itself is the other package.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from library.config import registry
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

MODULE = "networks.lycoris"
# algo, as LyCORIS 4 spells it in lower case → our kind
ALGORITHMS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "glora": "glora", "diag-oft": "oft",
    "boft": "boft", "ia3": "ia3", "full": "full", "dylora": "dylora",
}  # fmt: skip
# Other spellings of an argument → ours
_SPELLINGS = {
    "use_cp": "use_tucker", "use_conv_cp": "use_tucker", "weight_decompose": "dora_wd", "constrain": "constraint",
    "rescale": "rescaled",
}  # fmt: skip
_NOT_HERE = {
    "tlora": "its orthogonal variant is lycoris.kohya's alone; the plain one is --network_module networks.t_lora"
}
# What LyCORIS has and we do not: why it changes nothing, or "" where it would change the result and is refused
_WITHOUT = {
    "bypass_mode": "adapters here never form the whole weight where a product is cheaper",
    "use_scalar": "",
    "rank_dropout_scale": "",
    "train_t5xxl": "no text encoder of this kind is there",
}
_FALSE = ("false", "0", "none", "")
# Arguments that GUIs write for every algo, whether it has them or not
_OFTEN_WITHOUT_MEANING = (
    *("conv_dim", "conv_alpha", "use_tucker", "rank_dropout", "module_dropout", "dora_wd", "wd_on_output", "factor"),
    *("decompose_both", "full_matrix", "unbalanced_factorization", "constraint", "rescaled", "block_size", "rs_lora"),
    *("train_on_input",),
)


def algorithm_of(words: Sequence[str]) -> str:
    """`algo`, in lower case; LyCORIS' default is LoRA."""
    return _split(words).get("algo", "lora").strip("\"'").lower()


def kind_of(words: Sequence[str]) -> str:
    """The kind that `algo` names. Raises UserError."""
    given, algorithm = _split(words), algorithm_of(words)
    if algorithm in _NOT_HERE:
        raise UserError(f"--network_args: algo={algorithm}: {_NOT_HERE[algorithm]}")
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"--network_args: algo={algorithm}: unknown{did_you_mean(algorithm, ALGORITHMS) or '.'} "
            f"Known: {', '.join(ALGORITHMS)}"
        )
    kind = ALGORITHMS[algorithm]
    if kind == "lora" and given.get("dora_wd", given.get("weight_decompose", "")).lower() not in _FALSE:
        return "dora"
    return kind


def translate(words: Sequence[str], *, takes: Sequence[str], settled: Sequence[str] = ()) -> list[str]:
    """The words for the kind that `algo` names, which takes arguments of these names. Raises UserError.

    settled: those of them that a file settles (`--dim_from_weights`).

    A preset and a rank for convolutions are LyCORIS' defaults: everything. What a GUI writes for all kinds and this one
    does not have is left out with a warning.
    """
    kind = kind_of(words)
    given = {name: text for name, text in _split(words).items() if name != "algo"}
    for name in [name for name in _SPELLINGS if name in given]:
        ours, text = _SPELLINGS[name], given.pop(name)
        if given.get(ours, text).lower() != text.lower():
            logger.warning("--network_args: %s=%s has no effect beside %s=%s", ours, given[ours], name, text)
        given[ours] = text  # LyCORIS' older names win over its newer ones
    without = []
    for name in list(given):
        text = given[name].strip("\"'")
        if name in _WITHOUT:
            off = text.lower() in _FALSE
            if not off and not _WITHOUT[name]:
                raise UserError(f"--network_args: {name}={text}: {MODULE} does not have it, lycoris.kohya does")
            if not off:
                logger.warning("--network_args: %s has no effect: %s", name, _WITHOUT[name])
            del given[name]
        elif name in _OFTEN_WITHOUT_MEANING and name not in takes:
            if text.lower() not in _FALSE:
                without.append(name)
            del given[name]
    if without:
        logger.warning("--network_args: without effect with %s: %s", kind, ", ".join(without))
    if (preset := given.get("preset", "")).endswith(".toml"):
        raise UserError(
            f"--network_args: preset={preset}: presets in files are lycoris.kohya's alone; here preset takes a name, "
            "and include_patterns, exclude_patterns and network_reg_dims choose layers and ranks"
        )
    if idle := [name for name in given if name in settled]:
        logger.warning("--network_args: without effect with --dim_from_weights: %s", ", ".join(idle))
    if kind != "ia3":
        given.setdefault("preset", "full")
    elif preset == "ia3":  # LyCORIS' matches nothing; our kind sits there by itself
        del given["preset"]
    if kind == "dylora" and "unit" not in given:
        given.setdefault("block_size", "4")
    if "wd_on_output" in takes and given.get("dora_wd", "").lower() not in _FALSE:
        given.setdefault("wd_on_output", "True")
    if kind == "oft":
        given["dim_is_size"] = "True"  # kohya's networks.oft counts blocks
    return [f"{name}={text}" for name, text in given.items() if name not in settled]


def _split(words: Sequence[str]) -> dict[str, str]:
    return registry.split_words(words, where="--network_args")
