"""Merging adapter files into the weights of a base model: a new checkpoint, in the layout, names and types of the old.

Each weight is read, merged in fp32, rounded once and written before the next is read. Of a diffusers folder the files
of the parts that change are written again, and the rest is copied.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from library.errors import UserError
from library.files.atomic import replacing, replacing_folder
from library.files.index import read_index
from library.models.checkpoints.checkpoint import EMA_PREFIX
from library.models.checkpoints.folder import choose_weights, shards_of
from library.models.checkpoints.open_file import locate
from library.models.checkpoints.rewrite import Patch, RowChange, rewrite
from library.models.checkpoints.weights import Change
from library.models.opening import open_family
from networks.create import create_to_merge
from networks.load_report import check_loaded, some_names
from networks.lora import LoRA
from networks.tools.low_rank import factors_of
from networks.tools.result import MADE_FROM

if TYPE_CHECKING:
    from library.models.family import AdapterTargets, ModelFamily
    from networks.adapter import Adapter
    from networks.files import AdapterFile
    from networks.tools.methods import Method

logger = logging.getLogger(__name__)

WeightOf = Callable[[str], float]  # from a layer's name in files to the weight of a file there
MADE_ON = "ss_made_on"
_OLD_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".msgpack", ".h5")
_WHOLE_MODELS = (".safetensors", ".ckpt", ".pt")


def merge_into(
    base: str,
    sources: Sequence[AdapterFile],
    weights: Sequence[WeightOf],
    target: Path,
    *,
    method: Method,
    about: Mapping[str, str],
    allow_missing: bool,
    overwrite: bool,
) -> None:
    """Write the base model with these files in it to `target`, a .safetensors file or a folder, as `base` is one.

    about: the metadata of the result beside the base's own. Raises UserError, also for layers of a file that the base
    model lacks, unless `allow_missing`.
    """
    location = locate(base)
    _check_target(location, target, sources, overwrite=overwrite)
    family = open_family(base, whole=False)
    with family.outlined():
        changes = _changes(sources, weights, family.adapter_targets(), method, allow_missing=allow_missing)
        patches = _patches(family, changes)
    logger.info("%s: %d layers change", base, len(changes))
    about = {**about, MADE_ON: location.resolve().name}
    if location.is_dir():
        with replacing_folder(target) as folder:
            _write_folder(location, folder, patches, about)
    else:
        with replacing(target) as file:
            _write_file(location, file, patches[location], about)
    logger.info("%s is written", target)


def _check_target(base: Path, target: Path, sources: Sequence[AdapterFile], *, overwrite: bool) -> None:
    if not base.is_dir() and target.suffix != ".safetensors":
        raise UserError(f"--save_to {target}: the base is a file; give a name that ends with .safetensors")
    if base.is_dir() and target.suffix in _WHOLE_MODELS:
        raise UserError(f"--save_to {target}: the base is a diffusers folder; give the name of a folder")
    if base.resolve() in target.resolve().parents:
        raise UserError(f"--save_to {target}: lies inside of the base; give another place")
    if not target.exists():
        return
    inside = [Path(one.source).resolve() for one in sources]
    if target.samefile(base) or target.resolve() in (*inside, *base.resolve().parents):
        raise UserError(f"--save_to {target}: is one of the sources, or holds one; give another name")
    if not overwrite:
        raise UserError(f"--save_to {target}: exists already; give another name, or --overwrite")
    if target.is_dir() != base.is_dir():
        raise UserError(f"--save_to {target}: is a {'folder' if target.is_dir() else 'file'}, and the base is none")
    if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise UserError(f"--save_to {target}: is a folder, but not of a model: it is not replaced")


# -- what changes


@dataclass(frozen=True)
class _Share:
    """The part of one file in one layer. place: of the file in the list. tensors: as the file has them. weight: of the
    file in this layer."""

    place: int
    adapter: Adapter
    tensors: Mapping[str, Tensor]
    weight: float

    def in_fp32(self) -> dict[str, Tensor]:
        """Its tensors; formed for one layer at a time."""
        return {key: one.float() if one.is_floating_point() else one for key, one in self.tensors.items()}


Shares = Mapping[nn.Module, Sequence[_Share]]


@dataclass(frozen=True)
class _LayerChange:
    """The change of one layer's parameters: `shares` of `files` files, which `method` combines."""

    shares: Sequence[_Share]
    method: Method
    files: int

    def whole(self, leaf: str) -> Change:
        """From the fp32 value of a parameter to the new value."""
        if self.method.is_linear:
            return partial(_added, self.shares, leaf)
        return partial(_combined, self.shares, self.method, self.files, leaf)

    def by_rows(self, leaf: str) -> Callable[[], RowChange] | None:
        """The same for rows of the weight alone: sums of plain LoRAs."""
        plain = leaf == "weight" and self.method.is_linear and all(map(_is_product, self.shares))
        return partial(_added_to_rows, self.shares) if plain else None


def _changes(
    sources: Sequence[AdapterFile],
    weights: Sequence[WeightOf],
    targets: Sequence[AdapterTargets],
    method: Method,
    *,
    allow_missing: bool,
) -> dict[nn.Module, _LayerChange]:
    shares: dict[nn.Module, list[_Share]] = {}
    for place, (source, weight_of) in enumerate(zip(sources, weights, strict=True)):
        network = create_to_merge(source, targets, multiplier=1.0)
        report, layers = network.compare(source)
        check_loaded(report, source.source, sized_by_file=True)
        known: set[str] = set()
        for adapter in network.adapters:
            site = adapter.site
            known |= {site.name, site.alias, site.fused}
            weight = weight_of(site.name)
            tensors = {key: one for key, one in layers[site.name].items() if not one.is_meta}
            if weight:
                shares.setdefault(site.module, []).append(_Share(place, adapter, tensors, weight))
        if (missing := sorted(source.layers.keys() - known)) and not allow_missing:
            raise UserError(
                f"{source.source}: {len(missing)} of its layers are not in this base model:{some_names(missing)}\n"
                "Give --allow_missing to merge the others."
            )
    if not shares:
        raise UserError("no layer is left: every weight is 0")
    return {layer: _LayerChange(own, method, len(sources)) for layer, own in shares.items()}


def _is_product(share: _Share) -> bool:
    """Whether the difference is a product of two matrices."""
    return type(share.adapter) is LoRA and share.adapter.form.axis is None


def _added_to_rows(shares: Sequence[_Share]) -> RowChange:
    """As `_added`, for plain LoRAs: products of rows of `up`."""
    products = [(factors_of(share.in_fp32()), share.weight) for share in shares]

    def change(rows: Tensor, start: int) -> None:
        for factors, weight in products:
            rows.addmm_(factors.up[start : start + len(rows)], factors.down, alpha=weight)

    return change


def _added(shares: Sequence[_Share], leaf: str, weight: Tensor) -> Tensor:
    """One file after the other, each with its weight as the multiplier, as programs load them."""
    for share in shares:
        if leaf == "weight" and _is_product(share):
            matrix = weight.reshape(len(weight), -1)  # the difference itself never exists
            _added_to_rows([share])(matrix, 0)
            weight = matrix.view(weight.shape)
            continue
        share.adapter.multiplier = share.weight
        weight = share.adapter.merged(leaf, share.in_fp32(), weight)
    return weight


def _combined(shares: Sequence[_Share], method: Method, files: int, leaf: str, weight: Tensor) -> Tensor:
    deltas = [weight.new_zeros(()).expand_as(weight)] * files
    weights = [0.0] * files
    for share in shares:
        weights[share.place], deltas[share.place] = share.weight, _delta(share, leaf, weight)
    layer = shares[0].adapter.site.name + ("" if leaf == "weight" else f".{leaf}")
    return weight + method.combine(deltas, weights, layer=layer)


def _delta(share: _Share, leaf: str, weight: Tensor) -> Tensor:
    """The difference at multiplier 1; from the tensors alone where it does not depend on the weight."""
    adapter, tensors = share.adapter, share.in_fp32()
    if leaf == "weight" and not adapter.needs_weight(tensors):
        return type(adapter).delta_of(tensors, weight.shape)
    adapter.multiplier = 1.0
    return adapter.merged(leaf, tensors, weight) - weight


def _patches(family: ModelFamily, changes: Mapping[nn.Module, _LayerChange]) -> dict[Path, list[Patch]]:
    """The changes to each file of the base model."""
    found: dict[Path, list[Patch]] = {}
    for part in (name for name, kind in family.PARTS.items() if kind.section and name in family.components):
        entries = family.components.entries(part)
        for path, layer in family.components[part].named_modules():
            if (change := changes.get(layer)) is None:
                continue
            for leaf, parameter in layer.named_parameters(recurse=False):
                entry = entries[f"{path}.{leaf}"]
                if entry.scale is not None:
                    raise UserError(
                        f"{entry.file}: its fp8 weights have scales beside them, and sums would need others: merge "
                        "into a file in bf16 or fp16"
                    )
                shape, rows = tuple(parameter.shape), change.by_rows(leaf)
                found.setdefault(entry.file, []).append(Patch(entry, shape, change.whole(leaf), rows))
    return found


# -- writing


def _write_file(source: Path, target: Path, patches: Sequence[Patch], about: Mapping[str, str]) -> None:
    index = read_index(source)
    entries = {name: entry for name, entry in index.entries.items() if not name.startswith(EMA_PREFIX)}
    if len(entries) < len(index.entries):
        logger.warning("%s: the averaged (EMA) weights are left out, since nothing is merged into them", source)
        index = replace(index, entries=entries)
    metadata = {key: text for key, text in index.metadata.items() if key not in _OLD_HASHES} or {"format": "pt"}
    rewrite(target, index, patches, {**metadata, **about, MADE_FROM: _history(metadata, about)})


def _history(metadata: Mapping[str, str], about: Mapping[str, str]) -> str:
    """What the base was made from, if it was merged before, and what this result was."""
    try:
        before = json.loads(metadata.get(MADE_FROM, "[]"))
    except ValueError:
        before = []
    return json.dumps([*(before if isinstance(before, list) else []), *json.loads(about[MADE_FROM])])


def _write_folder(
    source: Path, target: Path, patches: Mapping[Path, Sequence[Patch]], about: Mapping[str, str]
) -> None:
    old = {file for folder in {file.parent for file in patches} for file in _other_weights(folder, patches)}
    old |= {file for file in source.iterdir() if file.suffix in _WHOLE_MODELS}
    for file in patches:
        if file.suffix != ".safetensors":
            raise UserError(
                f"{file}: of a diffusers folder only .safetensors files are written again, and this is none"
            )
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir() or any(word.startswith(".") for word in file.relative_to(source).parts):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if file in patches:
            _write_file(file, place, patches[file], about)
        elif file in old:
            logger.warning("%s: left out, since nothing is merged into its weights", file)
        else:
            shutil.copyfile(file, place)


def _other_weights(folder: Path, patches: Mapping[Path, Sequence[Patch]]) -> set[Path]:
    """Weights of a part that are not read, as those in half precision beside them."""
    names = {file.name for file in folder.iterdir()}
    chosen = choose_weights(names)
    assert chosen is not None
    kept = {chosen, *(shards_of(chosen, names) if chosen.endswith(".json") else ())}
    weights = {name for name in names if name.endswith(_WEIGHTS) or ".index." in name}
    return {folder / name for name in weights - kept} - patches.keys()
