"""The doors of kohya's scripts, `networks/merge_lora.py` and the others: the options that they share, and kohya's sum.

kohya's merge of LoRAs multiplies both factors of each by its ratio r and adds the factors, α₀ being the first file's:
down = Σ r √(α / α₀) down, up = Σ |r| √(α / α₀) up. So 0.6 acts as 0.36, and the product has terms of one LoRA's up and
another's down. Our merge does what the options say; `--as_kohya` repeats those numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.command import Command, read
from library.config.command import run as run_tool
from library.config.fields import REQUIRED, option
from library.errors import UserError
from networks.tools.output import OutputOptions, Precision, check_output

if TYPE_CHECKING:
    from torch import Tensor

    from networks.tools.block_weights import BlockWeights

logger = logging.getLogger(__name__)


def run(text: str | None, options_type: type, act: Callable[[Any], None], argv: Sequence[str] | None) -> int:
    """Read the options of a door that writes a file, and act. `text`: its help, which begins with its path.

    Returns the exit code: 2 for what the user can put right.
    """
    name = (text or "").removeprefix("kohya's ").partition(":")[0]
    command = Command(name=name, description=text or "", groups={"options": options_type})

    def acted(words: Sequence[str]) -> int:
        options = read(command, words).groups["options"]
        act(options)
        if getattr(options, "no_metadata", False) and getattr(options, "sd_model", None) is None:
            without_spec(options.save_to)
        return 0

    return run_tool(acted, argv)


@dataclass(frozen=True, kw_only=True)
class DoorOptions(OutputOptions):
    """Of the doors that write a file."""

    device: str | None = option(None, help="without effect: the decompositions take seconds on the CPU")


@dataclass(frozen=True, kw_only=True)
class SpecOptions(DoorOptions):
    """Of those whose file has modelspec.* in its metadata."""

    no_metadata: bool = option(False, help="no modelspec.* in the metadata")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(SpecOptions):
    """Of the doors that merge."""

    models: tuple[Path, ...] = option(REQUIRED, help="the LoRA files")
    ratios: tuple[float, ...] = option((), help="one for each file")
    precision: Precision | None = option(None, help="without effect: sums are formed in fp32")
    as_kohya: bool = option(False, help="the numbers of kohya's script")


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Weights by block."""

    lbws: tuple[str, ...] = option((), help="weights by block, [1,0,…] for each file")


@dataclass(frozen=True, kw_only=True)
class FactorsOptions(MergeOptions):
    """Of merge_lora.py and sdxl_merge_lora.py."""

    sd_model: str | None = option(None, help="a checkpoint to merge into")
    concat: bool = option(False, help="the factors beside each other: exact, ranks add up")
    shuffle: bool = option(False, help="without effect: the order of ranks changes nothing")


@dataclass(frozen=True, kw_only=True)
class RankOptions(MergeOptions, BlockOptions):
    """Of svd_merge_lora.py."""

    new_rank: int = option(4, minimum=1, help="of the result")
    new_conv_rank: int | None = option(None, minimum=1, help="that of wide convolutions; without it --new_rank")


def say_without_effect(options: DoorOptions, reasons: Mapping[str, str]) -> None:
    """A warning for each of these options that was given, with the reason why it changes nothing."""
    for name, reason in reasons.items():
        if getattr(options, name, None) not in (None, False, "float"):
            logger.warning("--%s has no effect: %s", name, reason)


def merge_loras(options: FactorsOptions) -> None:
    """kohya's merge_lora.py and sdxl_merge_lora.py. Raises UserError."""
    say_without_effect(options, {"v2": "the files state their family"})
    if options.sd_model is not None:
        _merge_into_checkpoint(options)
    else:
        _merge_factors(options)


def _merge_factors(options: FactorsOptions) -> None:
    from networks.tools import merge, result

    say_without_effect(
        options,
        {
            "precision": "sums are formed in fp32",
            "device": "the CPU takes seconds",
            "shuffle": "the order of ranks changes nothing",
        },
    )
    weights = merge.weights_for(options.models, options.ratios)
    if options.as_kohya:
        write_as_kohya(options, weights)
        return
    if len(options.models) > 1 or any(weight not in (0, 1) for weight in weights):
        logger.warning(
            "kohya's script applies a ratio to both factors of a LoRA, so that 0.6 acts as 0.36, and mixes the factors "
            "of different files; here each file acts as its ratio says. --as_kohya repeats kohya's numbers"
        )
    ranks: dict[bool, int] = {}
    blocks = blocks_of(options)
    if not options.concat:
        sources = result.read(options.models, purpose="is merged")
        for factors in (one for source in sources for one in result.factors(source).values()):
            ranks[factors.spatial] = max(ranks.get(factors.spatial, 0), factors.rank)
    merge.merge(
        options.models,
        weights,
        options.save_to,
        blocks=blocks,
        rank=ranks.get(False, ranks.get(True)),
        conv_rank=ranks.get(True),
        save_precision=options.save_precision or "float",
        overwrite=options.overwrite,
    )


def blocks_of(options: MergeOptions) -> list[BlockWeights] | None:
    """kohya's `--lbws`, a list for each file. Raises UserError."""
    from networks.tools.block_weights import BlockWeights

    lists = getattr(options, "lbws", None)
    if not lists:
        return None
    if options.as_kohya:
        raise UserError("--lbws with --as_kohya: weights by block are applied as they say alone")
    if len(lists) != len(options.models):
        raise UserError(f"--lbws: {len(lists)} lists for {len(options.models)} files; give one for each")
    return [BlockWeights.parse(text.strip("[] ")) for text in lists]


def _merge_into_checkpoint(options: FactorsOptions) -> None:
    """kohya's scripts add each LoRA's whole difference here as well."""
    from networks.tools import merge

    unused = {"save_precision": "its tensors keep their types", "precision": "sums are formed in fp32"}
    say_without_effect(options, unused | dict.fromkeys(("concat", "no_metadata"), "no LoRA is written"))
    merge.merge(
        options.models,
        merge.weights_for(options.models, options.ratios),
        options.save_to,
        blocks=blocks_of(options),
        base=options.sd_model,
        allow_missing=True,
        overwrite=options.overwrite,
    )


def write_as_kohya(options: FactorsOptions, weights: Sequence[float]) -> None:
    """kohya's sum of factors."""
    from networks.tools import result

    check_output(options.save_to, options.models, overwrite=options.overwrite)
    sources = result.read(options.models, purpose="is merged")
    layers = kohya_sum(
        [{name: own.tensors for name, own in one.layers.items()} for one in sources], weights, concat=options.concat
    )
    metadata = result.common_metadata(sources) | result.about_ranks(layers)
    metadata |= result.made_from(sources, weights, "kohya's sum of factors")
    result.write(options.save_to, layers, metadata, result.precision(options.save_precision or "float", sources))


def kohya_sum(
    sources: Sequence[Mapping[str, Mapping[str, Tensor]]], ratios: Sequence[float], *, concat: bool
) -> dict[str, dict[str, Tensor]]:
    """The sum of kohya's merge by layer; with `concat` the factors beside each other. alpha: of the first file that has
    the layer. `UserError` for different ranks without `concat`, and for LoCon with a core."""
    import torch

    from networks.lora import DOWN, MID, UP, LoRA

    found: dict[str, dict[str, Tensor]] = {}
    for source, ratio in zip(sources, ratios, strict=True):
        for name, tensors in source.items():
            if MID in tensors:
                raise UserError(f"--as_kohya: {name} is a LoCon with a core; kohya's sum is of pairs")
            alpha = float(tensors.get("alpha", torch.tensor(LoRA.rank_of(tensors))))
            first = found.setdefault(name, {"alpha": torch.tensor(alpha)})
            scale = math.sqrt(alpha / float(first["alpha"])) * ratio
            for end, axis, factor in ((DOWN, 0, scale), (UP, 1, abs(scale))):
                more = tensors[end].float() * factor
                if end not in first:
                    first[end] = more
                elif concat:
                    first[end] = torch.cat([first[end], more], dim=axis)
                elif first[end].shape != more.shape:
                    shapes = f"{list(first[end].shape)} and {list(more.shape)}"
                    raise UserError(f"--as_kohya: {name}.{end} has the shapes {shapes}; kohya's sum needs one rank")
                else:
                    first[end] = first[end] + more
    return found


def without_spec(path: Path) -> None:
    """Write a file once more without `modelspec.*`, as kohya's --no_metadata."""
    from library.files.header import read_metadata
    from networks import files

    metadata = {key: text for key, text in read_metadata(path).items() if not key.startswith("modelspec.")}
    files.write(path, files.read_tensors(path), metadata)


def merge_to_rank(options: RankOptions) -> None:
    """kohya's svd_merge_lora.py."""
    from networks.tools import merge, result
    from networks.tools.extract import clipped

    blocks = blocks_of(options)
    say_without_effect(options, {"precision": "sums are formed in fp32", "device": "the CPU takes seconds"})
    weights, ranks = merge.weights_for(options.models, options.ratios), (options.new_rank, options.new_conv_rank)
    precision, target = options.save_precision or "float", options.save_to
    if not options.as_kohya:
        logger.info("kohya's script clips the factors at the quantile 0.99 of their values; --as_kohya does so here")
        merge.merge(
            options.models,
            weights,
            target,
            blocks=blocks,
            rank=ranks[0],
            conv_rank=ranks[1],
            save_precision=precision,
            overwrite=options.overwrite,
        )
        return
    check_output(target, options.models, overwrite=options.overwrite)
    sources = result.read(options.models, purpose="is merged")
    layers = {}
    everywhere = merge.weights_in(sources, weights, None)
    factors = [result.factors(one) for one in sources]
    for name, one in merge.merged(factors, everywhere, merge.LINEAR, rank=None, conv_rank=None).items():
        rank = (ranks[1] or ranks[0]) if one.spatial else ranks[0]
        layers[name] = clipped(one.dense(), one.shape, rank, exact=True).tensors()
    metadata = result.common_metadata(sources) | result.about_ranks(layers)
    metadata |= result.made_from(sources, weights, f"kohya's SVD merge to rank {ranks[0]}")
    result.write(target, layers, metadata, result.precision(precision, sources))
