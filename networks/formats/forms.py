"""The tensors of one layer in the forms of other programs, turned into LyCORIS', and back.

The programs share the kinds, not all forms of them: PEFT has DoRA's norms as a list, folds nothing and keeps scales in
its configuration, OneTrainer has the factors of a convolution's LoHa with four axes. What would act otherwise here is
refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.models.checkpoints.adapter_file import kind_of_layer
from networks import kinds
from networks.adapter import WithRank
from networks.magnitude import DORA_SCALE

# Ends of names that stand for forms to be converted
MAGNITUDES = "lora_magnitude_vector"
SINGULAR_VALUES = "lora_E"
IA3 = "ia3_l"

_FACTORS = re.compile(r"hada_w[12]_[ab]|lokr_w[12]_[ab]")
_CORES = ("hada_t1", "hada_t2", "lokr_t2")
_KERNEL_AXES = 4
_ADALORA_EPS = 1e-5  # PEFT divides by the rank and this
_WITHOUT_BIAS = re.compile(r".*\.attn[12]\.to_[qkv]")  # of a UNet's layers
# (how a name ends, why such a file is not read)
_NOT_READ = (
    (r"lora_(?:B(?:\.\w+)?|up)\.bias", "no kind of adapter here has a bias beside a low-rank pair"),
    (r"oft_R(?:\.\w+)*", "PEFT and OneTrainer rotate what goes into the layer, diag-oft rotates what comes out of it"),
    (r"boft_[Rs](?:\.\w+)*", "PEFT rotates what goes into the layer, LyCORIS' BOFT rotates what comes out of it"),
    (r"vera_(?:lambda_[bd]|[AB])(?:\.\w+)*", "the tables that all layers share do not say how wide each layer is"),
)


@dataclass(frozen=True)
class Settings:
    """What a configuration of PEFT says about a layer, None where it says nothing. first_rank: AdaLoRA's `init_r`.
    by_root: rank-stabilised, scaled by alpha / sqrt(rank) (Kalajdzievski 2023)."""

    alpha: float | None = None
    rank: float | None = None
    first_rank: float | None = None
    by_root: bool = False


def why_not_read(key: str) -> str:
    """The reason why a tensor of this name is never read; "" if there is none."""
    for ends, reason in _NOT_READ:
        if re.search(rf"(?:\A|\.){ends}\Z", key):
            return reason
    return ""


def to_lycoris(own: Mapping[str, Tensor], settings: Settings, *, where: str, path: str) -> dict[str, Tensor]:
    """The tensors of the layer `path`, by their ends, in LyCORIS' form and with an alpha where the kind has one."""
    found = flat(own)
    if SINGULAR_VALUES in found:
        return _of_adalora(found, settings, where)
    if IA3 in found:
        return _of_ia3(found, where, path)
    if MAGNITUDES in found:
        up = found.get("lora_up.weight")
        axes = found[MAGNITUDES].ndim if up is None else up.ndim
        found[DORA_SCALE] = found.pop(MAGNITUDES).reshape(-1, *(1,) * (axes - 1))
    kind = kind_of_layer(_shapes(found), more=kinds.tensor_names())
    if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= found.keys() and settings.alpha and settings.rank:
        # PEFT scales these as well; all others take whole matrices as they are
        found["lokr_w2"] = found["lokr_w2"] * _scale(settings.alpha, settings)
        return {"alpha": torch.tensor(1.0), **found}
    if "alpha" not in found and (rank := _rank(kind, found)):
        alpha = rank if settings.alpha is None else settings.alpha
        found["alpha"] = torch.tensor(float(alpha) * (rank**0.5 if settings.by_root else 1.0))
    return found


def flat(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OneTrainer has the factors of a convolution as weights of layers, with four axes; LyCORIS has matrices."""
    if any(core in own for core in _CORES):
        return dict(own)
    return {
        end: tensor.flatten(1) if tensor.ndim == _KERNEL_AXES and _FACTORS.fullmatch(end) else tensor
        for end, tensor in own.items()
    }


def magnitudes(own: Mapping[str, Tensor], *, where: str) -> Tensor:
    """A layer's dora_scale as PEFT's lora_magnitude_vector: [out], of a convolution [1, out, 1, 1]."""
    scale, rows = own[DORA_SCALE], len(own["lora_up.weight"])
    if scale.numel() != rows or (scale.ndim > 1 and len(scale) != rows):
        raise UserError(
            f"{where}.{DORA_SCALE} {list(scale.shape)} has the norms of input channels, for which diffusers and PEFT "
            f"have no name: theirs are those of the {rows} rows, which networks.dora trains with wd_on_output=True"
        )
    return scale.reshape((1, -1, 1, 1) if own["lora_up.weight"].ndim == _KERNEL_AXES else (-1,))


def _of_adalora(own: Mapping[str, Tensor], settings: Settings, where: str) -> dict[str, Tensor]:
    """As a plain pair, with the singular values in `down`; PEFT scales by alpha / init_r, whatever ranks are left."""
    if settings.alpha is None or settings.first_rank is None:
        raise UserError(f"{where}: an AdaLoRA needs its adapter_config.json beside it: init_r and lora_alpha scale it")
    if lacking := {"lora_down.weight", "lora_up.weight"} - own.keys():
        raise UserError(f"{where} has a {SINGULAR_VALUES} and no {min(lacking)}")
    down = own["lora_down.weight"]
    alpha = settings.alpha * len(down) / (settings.first_rank + _ADALORA_EPS)
    pair = {"lora_down.weight": down * own[SINGULAR_VALUES], "lora_up.weight": own["lora_up.weight"]}
    return {**pair, "alpha": torch.tensor(alpha)}


def _of_ia3(own: Mapping[str, Tensor], where: str, path: str) -> dict[str, Tensor]:
    """PEFT's l multiplies what goes into a feed-forward layer, [1, in], or what comes out of another, bias included;
    LyCORIS' 1 + w leaves the bias alone."""
    factors = own[IA3]
    on_input = factors.ndim == 2 and factors.shape[0] == 1 and factors.shape[1] > 1
    if factors.ndim != 2 or not (on_input or _WITHOUT_BIAS.fullmatch(path)):
        raise UserError(f"{where}: PEFT's (IA)³ multiplies the bias of this layer as well, LyCORIS' does not")
    return {"weight": factors.flatten() - 1, "on_input": torch.tensor(int(on_input))}


def _rank(kind: str, own: Mapping[str, Tensor]) -> int | None:
    """Of a layer of a kind that has a rank, and all of its tensors."""
    reader = kinds.readers().get(kind)
    if reader is None or not issubclass(reader, WithRank) or reader.lacking(own) is not None:
        return None
    return reader.rank_of(own)


def _scale(alpha: float, settings: Settings) -> float:
    assert settings.rank is not None
    return alpha / (settings.rank**0.5 if settings.by_root else settings.rank)


def _shapes(own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {end: tuple(tensor.shape) for end, tensor in own.items()}
