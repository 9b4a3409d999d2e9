"""Other kinds of adapters as plain LoRA: exactly where a kind is of low rank, else by its largest singular values.

LoRA, LoCon with a core     exact at their own rank
DyLoRA                      cut to its first ranks, with alpha · √(rank / old rank): as those were trained
LoHa                        (U₁D₁) ∘ (U₂D₂) is a LoRA of rank r², by Khatri-Rao products
LoKr                        the singular values of kron(w1, w2) are all products of one of w1 and one of w2
full differences            by their singular values
DoRA, OFT, BOFT, (IA)³,     their difference depends on the base's weights: by its singular values
GLoRA
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.log import errors_only
from library.progress import bar
from networks import base_weights, files, kinds, loha, lokr, lycoris
from networks.adapter import Adapter
from networks.create import create_to_merge
from networks.files import AdapterFile
from networks.formats.own_form import OwnForm
from networks.full import DIFF, DIFF_BIAS, Full
from networks.load_report import some_names
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import DOWN, UP, LoRA
from networks.magnitude import DORA_SCALE
from networks.norm import Norm
from networks.tools import result
from networks.tools.low_rank import Factors, factors_of, of_matrix, truncated

if TYPE_CHECKING:
    from library.files.tensors import TensorEntry

logger = logging.getLogger(__name__)

# Convolutions wider than 1 × 1 by the ends of their names, in diffusers' and in the original layout …
_WIDE = re.compile(r"_(conv|conv1|conv2|conv_in|conv_out|op|in_layers_2|out_layers_3)\Z")
# … those that are 1 × 1 in every family, and those that are Linear in some
_POINT = re.compile(r"_(conv_shortcut|skip_connection)\Z")
_EITHER = re.compile(r"_(proj_in|proj_out)\Z")


@dataclass(frozen=True)
class _Layer:
    """A layer of the source. reader: its kind. shape: of the layer's weight. weight: where the base's lies."""

    name: str
    reader: type[Adapter]
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    weight: TensorEntry | None = None

    @property
    def is_lora(self) -> bool:
        return issubclass(self.reader, LoRA) and DORA_SCALE not in self.tensors


def to_lora(
    source: Path, target: Path, *, rank: int | None = None, conv_rank: int | None = None, base: str | None = None
) -> None:
    """Write `source` as a plain LoRA, and print the kept share of its energy. Raises UserError."""
    if conv_rank is not None and rank is None:
        raise UserError("--conv_rank has no effect without --rank")
    content = files.read(source, purpose="becomes a LoRA")
    if any(issubclass(kinds.readers()[own.kind], OwnForm) for own in content.layers.values()):
        raise UserError(f"{source}: is in the form of a run's state; the files that the run saves are LoRA")
    layers = _of_model(content, base) if base is not None else _of_file(content)
    layers, left = _without_norms(layers)
    is_dylora = _is_dylora(content.metadata) and all(one.is_lora for one in layers)
    found: dict[str, dict[str, Tensor]] = {}
    kept = whole = 0.0
    with torch.no_grad():
        for layer in bar(layers, desc="to LoRA", unit="layer"):
            most = conv_rank if conv_rank is not None and any(size > 1 for size in layer.shape[2:]) else rank
            if is_dylora and most is not None:
                found[layer.name] = first_ranks(layer.tensors, most)
                continue
            factors, energy = _factors(layer, most)
            kept, whole = kept + factors.norm() ** 2, whole + energy
            found[layer.name] = factors.tensors()
    if is_dylora and rank is not None:
        _say_unit(content, rank)
        print("a DyLoRA cut to its first ranks, which act as they were trained")
    else:
        print(f"kept {100 * min(kept / whole, 1) if whole else 100:.2f} % of the energy (squared Frobenius norm)")
    if left:
        logger.warning(
            "a LoRA has no differences of norms and biases, which are left out: %s", some_names(left).strip()
        )
    if trained_on := base_weights.read(source):
        logger.warning("%s: acts as it was trained only on top of %s", source, base_weights.in_words(trained_on))
    words = "convert to LoRA" + ("" if rank is None else f" of rank {rank}")
    metadata = {k: text for k, text in result.own_metadata(content).items() if k != "ss_network_args"}
    metadata |= result.about_ranks(found) | result.made_from([content], [1.0], words)
    result.write(target, found, metadata, result.precision(None, [content]))


def _without_norms(layers: Sequence[_Layer]) -> tuple[list[_Layer], list[str]]:
    """The layers that a LoRA can have, and the names of those of which it loses something."""
    kept = [layer for layer in layers if not issubclass(layer.reader, Norm)]
    if not kept:
        raise UserError("there are differences of norms alone: a LoRA has none")
    left = [layer.name for layer in layers if issubclass(layer.reader, Norm)]
    return kept, left + [f"{layer.name}.{DIFF_BIAS}" for layer in kept if DIFF_BIAS in layer.tensors]


def _is_dylora(metadata: Mapping[str, str]) -> bool:
    module = metadata.get("ss_network_module")
    by_algorithm = module == lycoris.MODULE and "algo=dylora" in result.network_arguments(metadata)
    return module == "networks.dylora" or by_algorithm


def _say_unit(content: AdapterFile, rank: int) -> None:
    arguments = json.loads(content.metadata.get("ss_network_args") or "{}")
    unit = int(arguments.get("unit") or arguments.get("block_size") or 1)
    if rank % unit:
        logger.warning("--rank %d: was never trained alone, it is no multiple of the file's unit %d", rank, unit)


# -- the layers


def _of_file(content: AdapterFile) -> list[_Layer]:
    """With the shapes that the tensors tell. `UserError` for kinds that need the base, and shapes that are not told."""
    readers, layers = kinds.readers(), []
    for name, own in content.layers.items():
        reader = readers[own.kind]
        if reader.needs_weight(own.tensors):
            raise UserError(
                f"{content.source}: {name} is {reader.NOUN}, and its difference depends on the base's weights: give "
                "--base"
            )
        shape = () if issubclass(reader, Norm) else shape_of(content, name, reader)
        layers.append(_Layer(name, reader, own.tensors, shape))
    return layers


def shape_of(content: AdapterFile, name: str, reader: type[Adapter]) -> tuple[int, ...]:
    """The shape of a layer's weight, from its tensors; where these are flat also from its name and the file's family.
    `UserError` for the ones of wide convolutions, whose kernel they do not show."""
    tensors = content.layers[name].tensors
    if issubclass(reader, Full):
        return tuple(tensors[DIFF].shape)
    if issubclass(reader, LoRA):
        return factors_of(tensors).shape
    if issubclass(reader, LoHa):
        factors, last = loha.factors_in(tensors), tensors[loha.T1 if loha.T1 in tensors else loha.W1_B]
        size, kernel = (len(factors.a1), factors.b1.shape[1]), tuple(last.shape[2:])
    else:
        w1, w2 = lokr.matrix_in(tensors, lokr.W1), lokr.matrix_in(tensors, lokr.W2)
        last = next(tensors[key] for key in (lokr.W2, lokr.T2, lokr.W2_B) if key in tensors)
        size, kernel = (len(w1) * len(w2), w1.shape[1] * w2.shape[1]), tuple(last.shape[2:])
    if kernel:
        return size[0], size[1] // math.prod(kernel), *kernel
    if _POINT.search(name):
        return *size, 1, 1
    version = content.metadata.get("ss_base_model_version", "")
    if _EITHER.search(name) and version.startswith("sd_v1"):
        return *size, 1, 1
    if _WIDE.search(name) or (_EITHER.search(name) and not version.startswith(("sd_v2", "sdxl"))):
        raise UserError(
            f"{content.source}: {name} may be a convolution, and its tensors do not show which: give --base"
        )
    return size


def _of_model(content: AdapterFile, base: str) -> list[_Layer]:
    """With the shapes and weights of a base model. `UserError` for layers that do not fit it."""
    from library.models.opening import open_family

    family = open_family(base, whole=False)
    with family.outlined(), errors_only(), torch.no_grad():
        network = create_to_merge(content, family.adapter_targets(), multiplier=1.0)
        report, own = network.compare(content)
        if other := (*report.mismatched, *report.unexpected):
            raise UserError(f"{content.source}: {len(other)} layers are not those of {base}:{some_names(other)}")
        parts = [name for name, kind in family.PARTS.items() if kind.section and name in family.components]
        places = {
            module: entries[f"{path}.weight"]
            for entries, part in ((family.components.entries(name), family.components[name]) for name in parts)
            for path, module in part.named_modules()
            if f"{path}.weight" in entries
        }
        layers = []
        for adapter in network.adapters:
            site = adapter.site
            tensors = {end: tensor for end, tensor in own[site.name].items() if not tensor.is_meta}
            shape = tuple(site.module.weight.shape)
            layers.append(_Layer(site.name, type(adapter), tensors, shape, places[site.module]))
    return layers


# -- their factors


def first_ranks(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A DyLoRA's layer cut to its first ranks: as they act in training, with alpha · √(rank / old rank)."""
    old = LoRA.rank_of(tensors)
    rank = min(rank, old)
    alpha = float(tensors.get("alpha", torch.tensor(old))) or old
    scaled = torch.tensor(alpha * math.sqrt(rank / old))
    return {"alpha": scaled, DOWN: tensors[DOWN][:rank].clone(), UP: tensors[UP][:, :rank].clone()}


def _factors(layer: _Layer, rank: int | None) -> tuple[Factors, float]:
    """The nearest LoRA of this rank to a layer's difference, and the energy of the difference. None: exact."""
    tensors = layer.tensors
    if not layer.reader.needs_weight(tensors):
        if layer.is_lora:
            return _cut(factors_of(tensors), rank)
        if issubclass(layer.reader, LoHa) and _is_low(LoHa.rank_of(tensors) ** 2, layer.shape):
            down, up = loha.khatri_rao(loha.factors_in(tensors))
            return _cut(Factors(up * _scale(LoHa, tensors), down, layer.shape), rank)
        if issubclass(layer.reader, LoKr):
            return of_kronecker(tensors, layer, rank)
    delta = _delta(layer)
    if rank is None:
        raise UserError(f"{layer.name}: its difference is of no low rank: give --rank")
    return of_matrix(delta.flatten(1), layer.shape, rank), float(delta.norm()) ** 2


def _delta(layer: _Layer) -> Tensor:
    """The dense difference, fp32, in the weight's shape."""
    from library.models.checkpoints.weights import Reader

    if not layer.reader.needs_weight(layer.tensors):
        return layer.reader.delta_of(layer.tensors, layer.shape)
    assert layer.weight is not None, "kinds that need the base were refused without"
    with Reader() as reader:
        weight = reader.read(layer.weight, dtype=torch.float32, device=torch.device("cpu")).view(layer.shape)
    return layer.reader.effective_weight(weight, layer.tensors, 1.0) - weight


def of_kronecker(tensors: Mapping[str, Tensor], layer: _Layer, rank: int | None) -> tuple[Factors, float]:
    """Of a LoKr: the largest products of a singular value of w1 and one of w2, whose vectors are the Kronecker products
    of theirs. None: all of them that are not 0, if those are few enough for a LoRA."""
    scale = 1.0 if lokr.W1 in tensors and lokr.W2 in tensors else _scale(LoKr, tensors)
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(lokr.matrix_in(tensors, name), full_matrices=False) for name in (lokr.W1, lokr.W2)
    )
    products = torch.outer(s1, s2).flatten()
    energy = float(products.double().square().sum()) * scale**2
    if rank is None:
        rank = max(1, int((products > 1e-6 * products.max()).sum()))  # fp32's rounding leaves values of 1e-7
        if not _is_low(rank, layer.shape):
            raise UserError(f"{layer.name}: its difference is of rank {rank}, which is no low one: give --rank")
    values, places = products.topk(min(rank, len(products)))
    first, second = places // len(s2), places % len(s2)
    root = (values * abs(scale)).sqrt()
    up = (u1[:, None, first] * u2[None, :, second]).flatten(0, 1) * root * math.copysign(1.0, scale)
    down = (v1[first, :, None] * v2[second, None, :]).flatten(1) * root[:, None]
    return Factors(up, down, layer.shape), energy


def _cut(factors: Factors, rank: int | None) -> tuple[Factors, float]:
    energy = factors.norm() ** 2
    return (factors if rank is None or rank >= factors.rank else truncated(factors, rank)), energy


def _scale(reader: type[LoHa | LoKr], tensors: Mapping[str, Tensor]) -> float:
    rank = reader.rank_of(tensors)
    return reader.scale_for(float(tensors.get("alpha", torch.tensor(rank))), rank)


def _is_low(rank: int, shape: Sequence[int]) -> bool:
    """Whether factors of this rank are smaller than the weight."""
    out, inputs = shape[0], math.prod(shape[1:])
    return rank * (out + inputs) < out * inputs
