"""Merge LoRA files into one, or into a checkpoint.

python -m networks.tools merge fox.safetensors style.safetensors --weights 0.8 0.6 --save_to both.safetensors
python -m networks.tools merge fox.safetensors style.safetensors --rank 16 --save_to both.safetensors
python -m networks.tools merge fox.safetensors style.safetensors --method ties --rank 16 --save_to both.safetensors
python -m networks.tools merge fox.safetensors --base sd15.safetensors --weights 0.8 --save_to sd15-fox.safetensors
python -m networks.tools merge fox.safetensors style.safetensors --advise both.png

The result adds Σ weight · difference to the base, weights may be negative. Without --rank the pairs stand beside each
other: that is exact, and the ranks add up. With --rank the sum is cut to its largest singular values. Other methods
than linear form each layer's difference, so that their result is cut to --rank, or goes into a checkpoint as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import option
from library.errors import UserError
from library.progress import bar
from networks.tools.block_weights import BlockWeights
from networks.tools.methods import METHODS, Method, MethodName
from networks.tools.output import ResultOptions, check_output

if TYPE_CHECKING:
    from networks.files import AdapterFile
    from networks.tools.low_rank import Factors

logger = logging.getLogger(__name__)

WeightOf = Callable[[str], float]  # from a layer's name in files to the weight of a file there
LINEAR = Method()


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The sum"""

    weights: tuple[float, ...] = option((), help="one for each file; without them 1, of slerp 0.5")
    lbw: tuple[str, ...] = option(
        (),
        help="weights by block, one list for each file, times its weight: 17 or 26 numbers (SD 1.x, 2.x), 12 or 20 "
        "(SDXL), named ones as OUT=0,IN05=0.5, or one number for all",
    )
    method: MethodName | None = option(
        None, help="; ".join(f"{name}: {text}" for name, text in METHODS.items()) + ". Without it linear"
    )
    density: float | None = option(None, help="of ties, dare, dare_ties: the share of weights that is kept")
    seed: int | None = option(None, help="of dare and dare_ties; without it 0")
    rank: int | None = option(None, minimum=1, help="cut the sum to this rank; without it the ranks add up")
    conv_rank: int | None = option(None, minimum=1, help="that of convolutions wider than 1 × 1; without it --rank")
    base: str | None = option(None, help="merge into this base model: a file or a diffusers folder")
    allow_missing: bool = option(False, help="with --base: leave out layers that it lacks")
    advise: Path | None = option(
        None, help="write no file but this .png, a plot of how far the LoRAs conflict, and advise"
    )


@dataclass(frozen=True, kw_only=True)
class MergedOptions(ResultOptions):
    """What is written"""

    save_to: Path | None = option(None, help="the .safetensors to write, or with --base a folder, as the base is one")


COMMAND = Command(
    name="lora-tools merge",
    description=__doc__,
    groups={"merge": MergeOptions, "output": MergedOptions},
    words=(Word("FILE", "the LoRA files", many=True),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options, output = given.groups["merge"], given.groups["output"]
    files = [Path(word) for word in given.words]
    blocks = blocks_for(files, options.lbw)
    if options.advise is not None:
        if idle := [name for name in given.given if name not in ("advise", "weights", "lbw", "overwrite")]:
            raise UserError(f"--{idle[0]} has no effect with --advise, which merges nothing")
        weights = weights_for(files, options.weights)
        print("\n".join(advise(files, weights, options.advise, blocks=blocks, overwrite=output.overwrite)))
        return 0
    if output.save_to is None:
        raise UserError("--save_to: the file to write is missing; or give --advise, which writes none")
    method = Method.of(options.method, options.density, options.seed, files=len(files))
    merge(
        files,
        weights_for(files, options.weights, usual=method.usual_weight),
        output.save_to,
        method=method,
        blocks=blocks,
        rank=options.rank,
        conv_rank=options.conv_rank,
        base=options.base,
        allow_missing=options.allow_missing,
        save_precision=output.save_precision,
        overwrite=output.overwrite,
    )
    return 0


def advise(
    paths: Sequence[Path],
    weights: Sequence[float],
    picture: Path,
    *,
    blocks: Sequence[BlockWeights] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Plot how far files conflict, and return the lines of the report. Raises UserError."""
    from networks.tools import advise, result

    if len(paths) < 2:
        raise UserError("--advise: compares files; give two or more")
    check_output(picture, list(paths), overwrite=overwrite, option="--advise", end=".png")
    sources = result.read(paths, purpose="is compared")
    files = []
    for source, weight_of in zip(sources, weights_in(sources, weights, blocks), strict=True):
        own = {name: one.times(weight_of(name)) for name, one in result.factors(source).items() if weight_of(name)}
        files.append(own)
    pairs = advise.pairs_of([path.name for path in paths], files)
    advise.plot(picture, pairs)
    return [*advise.report(pairs), f"plot: {picture}"]


def weights_for(files: Sequence[Path], weights: Sequence[float], *, usual: float = 1.0) -> list[float]:
    """A weight for each file, without any the usual one. `UserError` unless their numbers agree."""
    if not weights:
        return [usual] * len(files)
    if len(weights) != len(files):
        raise UserError(f"--weights: {len(weights)} for {len(files)} files; give one for each")
    return list(weights)


def blocks_for(files: Sequence[Path], lists: Sequence[str]) -> list[BlockWeights] | None:
    """The weights by block of each file; None without any. Raises UserError."""
    if not lists:
        return None
    if len(lists) != len(files):
        raise UserError(f"--lbw: {len(lists)} lists for {len(files)} files; give one for each, 1 for a file without")
    return [BlockWeights.parse(text) for text in lists]


def merge(
    paths: Sequence[Path],
    weights: Sequence[float],
    target: Path,
    *,
    method: Method = LINEAR,
    blocks: Sequence[BlockWeights] | None = None,
    rank: int | None = None,
    conv_rank: int | None = None,
    base: str | None = None,
    allow_missing: bool = False,
    save_precision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the merged files as one, or, with a `base`, in a base model. Raises UserError."""
    from networks.tools import result

    _check_options(method, rank, conv_rank, base, allow_missing=allow_missing, save_precision=save_precision)
    if base is None:
        check_output(target, list(paths), overwrite=overwrite)
    sources = result.read(paths, purpose="is merged", any_kind=base is not None)
    weights_of = weights_in(sources, weights, blocks)
    texts = None if blocks is None else [one.text for one in blocks]
    made = result.made_from(sources, weights, str(method), blocks=texts)
    if base is not None:
        from networks.tools.into_checkpoint import merge_into

        asked = {"allow_missing": allow_missing, "overwrite": overwrite}
        merge_into(base, sources, weights_of, target, method=method, about=made, **asked)
        return
    factors = [result.factors(one) for one in sources]
    found = merged(factors, weights_of, method, rank=rank, conv_rank=conv_rank)
    if not found:
        raise UserError("no layer is left: every weight is 0")
    layers = {name: one.tensors() for name, one in found.items()}
    if rank is not None:
        made[result.MADE_BY] += f", SVD to rank {rank} (convolutions {conv_rank or rank})"
    metadata = result.common_metadata(sources) | result.about_ranks(layers) | made
    result.write(target, layers, metadata, result.precision(save_precision, sources))


def _check_options(
    method: Method,
    rank: int | None,
    conv_rank: int | None,
    base: str | None,
    *,
    allow_missing: bool,
    save_precision: str | None,
) -> None:
    if base is not None:
        if method.name == "svd":
            raise UserError("--method svd: has no use with --base, which takes the whole sum; give --method linear")
        for name, value in (("--rank", rank), ("--conv_rank", conv_rank), ("--save_precision", save_precision)):
            if value is not None:
                raise UserError(f"{name} has no effect with --base: its weights keep their shapes and types")
        return
    if allow_missing:
        raise UserError("--allow_missing has no effect without --base")
    if conv_rank is not None and rank is None:
        raise UserError("--conv_rank has no effect without --rank")
    if rank is None and method.name != "linear":
        raise UserError(f"--method {method.name}: needs --rank, to which its result is cut, or --base")


def weights_in(
    sources: Sequence[AdapterFile], weights: Sequence[float], blocks: Sequence[BlockWeights] | None
) -> list[WeightOf]:
    """Each file's weight by layer. `UserError` for a list of another family, or one that lacks a number for a layer."""
    if blocks is None:
        return [partial(_same, weight) for weight in weights]
    found: list[WeightOf] = []
    for place, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        own = blocks[place]
        own.check(source.metadata.get("ss_base_model_version", ""), source.source)
        for name in source.layers:
            own.of(name)
        found.append(partial(_by_block, weight, own))
    return found


def _same(weight: float, layer: str) -> float:
    return weight


def _by_block(weight: float, blocks: BlockWeights, layer: str) -> float:
    return weight * blocks.of(layer)


def merged(
    sources: Sequence[Mapping[str, Factors]],
    weights: Sequence[WeightOf],
    method: Method,
    *,
    rank: int | None,
    conv_rank: int | None,
) -> dict[str, Factors]:
    """The result in each layer, which need not be in every source. `rank` None, of linear methods: exact."""
    from networks.tools.low_rank import truncated

    names = list(dict.fromkeys(name for source in sources for name in source))
    found, kept, whole = {}, 0.0, 0.0
    for name in bar(names, desc="merging", unit="layer"):
        own = [weight(name) for weight in weights]
        if not any(one for one, source in zip(own, sources, strict=True) if name in source):
            continue
        parts = [source.get(name) for source in sources]
        if not method.is_linear:
            assert rank is not None
            square, found[name] = _combined(name, parts, own, method, rank, conv_rank or rank)
            whole, kept = whole + square, kept + found[name].norm() ** 2
            continue
        one = _summed(name, parts, own)
        if rank is not None:
            exact, one = one, truncated(one, (conv_rank or rank) if one.spatial else rank)
            whole, kept = whole + exact.norm() ** 2, kept + one.norm() ** 2
        found[name] = one
    if whole:
        share = kept / whole
        words = "kept %.2f %% of the energy (squared Frobenius norm): the relative error is %.3g"
        logger.info(words, 100 * share, max(1 - share, 0.0) ** 0.5)
    return found


def _summed(name: str, parts: Sequence[Factors | None], weights: Sequence[float]) -> Factors:
    """The weighted sum in a layer, exactly."""
    from networks.tools.low_rank import stacked

    pairs = zip(parts, weights, strict=True)
    return stacked([part.times(weight) for part, weight in pairs if weight and part is not None], name)


def _combined(
    name: str, parts: Sequence[Factors | None], weights: Sequence[float], method: Method, rank: int, conv_rank: int
) -> tuple[float, Factors]:
    """The squared norm of the result in a layer, and the result cut to the rank."""
    import torch

    from networks.tools.low_rank import of_matrix, same_shape

    shape = same_shape([part for part in parts if part is not None], name)
    nothing = torch.zeros(shape[0], math.prod(shape[1:]))
    deltas = [nothing if part is None else part.dense() for part in parts]
    delta = method.combine(deltas, weights, layer=name)
    spatial = any(size != 1 for size in shape[2:])
    return float(delta.double().square().sum()), of_matrix(delta, shape, conv_rank if spatial else rank)
