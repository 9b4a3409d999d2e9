"""Extract a LoRA from two base models: the difference between a fine-tuned model and the one it began with.

python -m networks.tools extract sd15.safetensors tuned.safetensors --rank 32 --save_to tuned-lora.safetensors
python -m networks.tools extract sd15.safetensors tuned.safetensors --rank 32 --conv_rank 16 --save_to …

Either is a single file, a diffusers folder or a hub id. Each layer's difference is cut to its largest singular values.
Only one layer of each model is in memory at a time. Differences in other weights than those of the layers that a LoRA
sits on (biases, norms, embeddings; convolutions without --conv_rank; the VAE) are not in the result: their share is
printed, but for the VAE's.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import REQUIRED, option
from library.errors import UserError
from library.progress import bar
from networks.tools.output import OutputOptions, check_output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.files.tensors import TensorEntry
    from library.models.checkpoints.weights import Reader
    from library.models.family import ModelFamily
    from networks.sites import Site
    from networks.tools.low_rank import Factors

logger = logging.getLogger(__name__)

KOHYA_QUANTILE = 0.99


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """The difference"""

    rank: int = option(REQUIRED, minimum=1, help="of Linear layers and 1 × 1 convolutions")
    conv_rank: int | None = option(None, minimum=1, help="that of wider convolutions; without it these are left out")
    clamp_quantile: float = option(
        1.0,
        help="clip a layer's factors at this quantile of their values, as kohya's script does at 0.99; 1: not at all",
    )
    min_diff: float = option(
        0.0, minimum=0, help="leave a text encoder out if no value of its layers differs by more than this"
    )
    v_parameterization: bool = option(False, help="the models are of v prediction, where no file states it")
    exact: bool = option(False, help="the exact decomposition of large layers as well")


COMMAND = Command(
    name="lora-tools extract",
    description=__doc__,
    groups={"extract": ExtractOptions, "output": OutputOptions},
    words=(
        Word("BASE", "the model that the LoRA is for: a file, a diffusers folder or a hub id"),
        Word("TUNED", "the model that base and LoRA are to act like"),
    ),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    base, tuned = given.words
    output: OutputOptions = given.groups["output"]
    extract(
        base,
        tuned,
        output.save_to,
        **vars(given.groups["extract"]),
        save_precision=output.save_precision,
        overwrite=output.overwrite,
    )
    return 0


@dataclass
class _Part:
    """A part of the model: its layers by their weights' names, where both models' weights lie, and sums of squares."""

    title: str
    section: str  # "unet" or "text_encoder"
    sites: dict[str, Site]
    base: Mapping[str, TensorEntry]
    tuned: Mapping[str, TensorEntry]
    whole: float = 0.0
    lost: float = 0.0
    outside: float = 0.0
    found: int = 0
    others: list[str] = field(default_factory=list)  # names of weights that differ and are in no layer

    def __str__(self) -> str:
        """How much of the difference the LoRA has."""
        if not self.found and not self.others:
            return f"{self.title}: the same in both models"
        kept = f", {100 * (1 - self.lost / self.whole):.2f} % of their difference's energy kept" if self.whole else ""
        words = f"{self.title}: {self.found} of {len(self.sites)} layers differ{kept}"
        if self.others:
            share = 100 * self.outside / (self.whole + self.outside)
            words += f"; {share:.2f} % of all energy is in {len(self.others)} weights that are left out, such as "
            words += self.others[0]
        return words


def extract(
    base: str,
    tuned: str,
    target: Path,
    *,
    rank: int,
    conv_rank: int | None = None,
    clamp_quantile: float = 1.0,
    min_diff: float = 0.0,
    exact: bool = False,
    v_parameterization: bool = False,
    save_precision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the difference `tuned` - `base` as a LoRA, and print how much of it that keeps. Raises UserError."""
    import torch

    from library.models.opening import open_family
    from networks.tools import result

    if not 0 < clamp_quantile <= 1:
        raise UserError(f"--clamp_quantile {clamp_quantile:g}: takes a share above 0, up to 1")
    check_output(target, [Path(base), Path(tuned)], overwrite=overwrite)
    velocity = {"v_parameterization": "--v_parameterization"} if v_parameterization else {}
    family = open_family(base, options={"v_parameterization": v_parameterization}, given=velocity, whole=False)
    other = open_family(tuned, whole=False)
    if family.NAME != other.NAME:
        raise UserError(f"{base} is {family.TITLE} and {tuned} is {other.TITLE}: their difference is no LoRA")
    parts = _parts(family, other, conv=conv_rank is not None)
    found: dict[str, Factors] = {}
    with torch.no_grad():
        for part in parts:
            _extract_part(part, found, rank, conv_rank, clamp_quantile, min_diff, exact=exact)
    if not found:
        raise UserError(f"{base} and {tuned}: no layer that a LoRA sits on differs; nothing to write")
    layers = {name: factors.tensors() for name, factors in found.items()}
    metadata = _metadata(family, tuned, target, rank, conv_rank, clamp_quantile)
    dtype = result.precision(save_precision, []) if save_precision else _precision(parts)
    result.write(target, layers, metadata | result.about_ranks(layers), dtype)


def _parts(family: ModelFamily, other: ModelFamily, *, conv: bool) -> list[_Part]:
    """The parts that adapters sit on. `UserError` unless both models' weights have the same names and shapes."""
    from networks.sites import find_sites

    parts = []
    with family.outlined():
        sites = {site.module: site for site in find_sites(family.adapter_targets(), conv=conv)}
        for name, kind in family.PARTS.items():
            if not kind.section:
                continue
            if name not in family.components or other.components.absent(name):
                logger.warning("the %s is left out: it is not in both", kind.title)
                continue
            modules = family.components[name].named_modules()
            own = {f"{path}.weight": sites[module] for path, module in modules if module in sites}
            first, second = family.components.entries(name), other.components.entries(name)
            _check_same(first, second, f"{family.path} and {other.path}, {kind.title}")
            parts.append(_Part(kind.title, kind.section, own, first, second))
    return parts


def _check_same(first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry], where: str) -> None:
    if only := sorted(first.keys() ^ second.keys()):
        raise UserError(f"{where}: only one of them has {only[0]}; {len(only)} names differ")
    for name, entry in first.items():
        # a 1 × 1 convolution and a Linear hold the same numbers: files differ in which they have
        if entry.count != second[name].count or entry.shape[:2] != second[name].shape[:2]:
            raise UserError(f"{where}: {name} is {list(entry.shape)} in one, {list(second[name].shape)} in the other")


def _extract_part(
    part: _Part,
    found: dict[str, Factors],
    rank: int,
    conv_rank: int | None,
    clamp_quantile: float,
    min_diff: float,
    *,
    exact: bool,
) -> None:
    """Add the factors of a part's layers to `found`, and its sums to the part."""
    from library.models.checkpoints.weights import Reader
    from networks.tools.low_rank import of_matrix

    names = sorted(part.base, key=lambda name: (str(part.base[name].file), part.base[name].offset))
    with Reader() as reader:
        if min_diff and part.section == "text_encoder":
            largest = max(float(_difference(reader, part, name).abs().max()) for name in part.sites)
            if largest <= min_diff:
                print(f"{part.title}: left out, no value differs by more than {largest:g} (--min_diff {min_diff:g})")
                return
        for name in bar(names, desc=f"{part.title}: extracting", unit="tensor"):
            delta = _difference(reader, part, name)
            energy = _energy(delta)
            if not energy:
                continue
            site = part.sites.get(name)
            if site is None:
                part.outside += energy
                part.others.append(name)
                continue
            most = conv_rank if site.spatial and conv_rank is not None else rank
            matrix = delta.view(len(site.module.weight), -1)
            shape = tuple(site.module.weight.shape)
            if clamp_quantile < 1:
                factors = clipped(matrix, shape, most, clamp_quantile, exact=exact)
            else:
                factors = of_matrix(matrix, shape, most, exact=exact)
            part.found += 1
            part.whole += energy
            part.lost += _energy(matrix - factors.dense())
            found[site.name] = factors
    print(part)


def _difference(reader: Reader, part: _Part, name: str) -> Tensor:
    """tuned - base of one weight, flat, fp32. `UserError` where it is NaN or infinite."""
    import torch

    first, second = (
        reader.read(entries[name], dtype=torch.float32, device=torch.device("cpu"))
        for entries in (part.base, part.tuned)
    )
    delta = second.sub_(first)
    if not delta.isfinite().all():
        file = part.tuned[name].file if first.isfinite().all() else part.base[name].file
        raise UserError(f"{file}: {part.title}, {name} holds NaN or infinity")
    return delta


def _energy(delta: Tensor) -> float:
    """The sum of squares, in fp64."""
    import torch

    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def clipped(
    delta: Tensor, shape: tuple[int, ...], rank: int, quantile: float = KOHYA_QUANTILE, *, exact: bool = False
) -> Factors:
    """As `low_rank.of_matrix`, with the factors U · σ and Vᵀ clipped as kohya's scripts do: at ± the quantile of the
    values of both. (Not of the absolute values, so that the signs of the singular vectors, which are free, matter.)"""
    import numpy
    import torch

    from networks.tools.low_rank import Factors, largest

    left, values, right = largest(delta, rank, exact=exact)
    up = left * values
    # torch's quantile refuses more than 16 million values
    highest = float(numpy.quantile(torch.cat([up.flatten(), right.flatten()]).numpy(), quantile))
    return Factors(up.clamp(-highest, highest), right.clamp(-highest, highest), shape)


def _precision(parts: list[_Part]) -> torch.dtype:
    """That of both models' layers; fp32 where they differ, or are in 8 bits."""
    import torch

    found = {entries[name].dtype for part in parts for name in part.sites for entries in (part.base, part.tuned)}
    name = found.pop() if len(found) == 1 else ""
    return getattr(torch, name) if name in ("float16", "bfloat16") else torch.float32


def _metadata(
    family: ModelFamily, tuned: str, target: Path, rank: int, conv_rank: int | None, quantile: float
) -> dict[str, str]:
    """Of a LoRA for this base, with the models by name and, of files, their hashes."""
    from library.files.hashes import model_metadata
    from library.record.modelspec import ModelSpec, spec_metadata
    from networks.tools.result import MADE_BY, MADE_FROM

    hashes = [model_metadata("sd_model", path) for path in (family.path, tuned)]
    rows = [
        {"name": one["ss_sd_model_name"], "weight": weight, "sha256": one.get("ss_new_sd_model_hash")}
        for one, weight in zip(hashes, (-1.0, 1.0), strict=True)
    ]
    words = f"extract to rank {rank}" + ("" if conv_rank is None else f" (convolutions {conv_rank})")
    words += f", clipped at the quantile {quantile:g}" if quantile < 1 else ""
    size, convolutions = family.native_resolution, {"conv_dim": conv_rank, "conv_alpha": conv_rank}
    spec = ModelSpec(
        architecture=family.architecture,
        title=target.stem,
        resolution=(size, size),
        prediction_type=family.process.prediction_type,
        implementation=family.implementation,
        merged_from=",".join(one["ss_sd_model_name"] for one in hashes),
    )
    return {
        "ss_base_model_version": family.base_model_version,
        "ss_v2": str(family.base_model_version.startswith("sd_v2")),
        **hashes[0],
        **({} if conv_rank is None else {"ss_network_args": json.dumps(convolutions)}),
        MADE_FROM: json.dumps(rows),
        MADE_BY: words,
        **spec_metadata(spec, now=time.time()),
    }
