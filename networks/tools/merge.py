"""Merge LoRA files into one: exactly, or cut to a rank.

python -m networks.tools merge fox.safetensors style.safetensors --weights 0.8 0.6 --save_to both.safetensors
python -m networks.tools merge fox.safetensors style.safetensors --rank 16 --save_to both.safetensors

The result adds Σ weight · difference to the base, weights may be negative. Without --rank the pairs stand beside each
other: that is exact, and the ranks add up. With --rank the sum is cut to its largest singular values.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.progress import bar
from networks.tools import command

if TYPE_CHECKING:
    from networks.tools.low_rank import Factors

logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the sub-command."""
    parser.add_argument("files", nargs="+", type=Path, help="the LoRA files")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each file; without them 1")
    parser.add_argument("--rank", type=int, help="cut the sum to this rank; without it the ranks add up")
    parser.add_argument("--conv_rank", type=int, help="that of convolutions wider than 1 × 1; without it --rank")
    command.add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    merge(
        options.files,
        weights_for(options.files, options.weights),
        options.save_to,
        rank=options.rank,
        conv_rank=options.conv_rank,
        save_precision=options.save_precision,
        overwrite=options.overwrite,
    )
    return 0


def weights_for(files: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """A weight for each file. `UserError` unless their numbers agree and each is finite."""
    if weights is None:
        return [1.0] * len(files)
    if len(weights) != len(files):
        raise UserError(f"--weights: {len(weights)} for {len(files)} files; give one for each")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise UserError(f"--weights: {wrong[0]} is no weight")
    return list(weights)


def merge(
    paths: Sequence[Path],
    weights: Sequence[float],
    target: Path,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    save_precision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weighted sum of LoRA files. Raises UserError."""
    from networks.tools import result

    check_ranks({"--rank": rank, "--conv_rank": conv_rank})
    if conv_rank is not None and rank is None:
        raise UserError("--conv_rank has no effect without --rank")
    command.check_output(target, list(paths), overwrite=overwrite)
    sources = result.read(paths, purpose="is merged")
    found = summed([result.factors(one) for one in sources], weights, rank=rank, conv_rank=conv_rank)
    if not found:
        raise UserError("no layer is left: every weight is 0")
    layers = {name: one.tensors() for name, one in found.items()}
    method = "linear" if rank is None else f"linear, SVD to rank {rank} (convolutions {conv_rank or rank})"
    metadata = result.common_metadata(sources) | result.about_ranks(layers) | result.made_from(sources, weights, method)
    result.write(target, layers, metadata, result.precision(save_precision, sources))


def check_ranks(ranks: Mapping[str, int | None]) -> None:
    """`UserError` for a rank below 1, by its option."""
    for name, rank in ranks.items():
        if rank is not None and rank < 1:
            raise UserError(f"{name} {rank}: has to be 1 or more")


def summed(
    sources: Sequence[Mapping[str, Factors]], weights: Sequence[float], *, rank: int | None, conv_rank: int | None
) -> dict[str, Factors]:
    """Σ weight · difference of each layer, which need not be in every source. `rank` None: exact."""
    from networks.tools.low_rank import stacked, truncated

    names = list(dict.fromkeys(name for source in sources for name in source))
    found, kept, whole = {}, 0.0, 0.0
    for name in bar(names, desc="merging", unit="layer"):
        pairs = zip(sources, weights, strict=True)
        parts = [source[name].times(weight) for source, weight in pairs if weight and name in source]
        if not parts:
            continue
        one = stacked(parts, name)
        if rank is not None:
            exact, one = one, truncated(one, (conv_rank or rank) if one.spatial else rank)
            whole, kept = whole + exact.norm() ** 2, kept + one.norm() ** 2
        found[name] = one
    if whole:
        logger.info("kept %.2f %% of the energy (squared Frobenius norm)", 100 * kept / whole)
    return found
