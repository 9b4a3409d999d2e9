"""Average saved files of one run, after the training: all alike, or exponentially with a half-life in steps.

python -m networks.tools ema fox-000001.safetensors fox-000002.safetensors fox.safetensors --save_to mean.safetensors
python -m networks.tools ema fox-*.safetensors fox.safetensors --half_life 200 --save_to ema.safetensors

The tensors themselves are averaged, as an EMA during training averages them, in fp32; with --half_life a file counts
half as much as one saved that many steps later. This works for every kind of adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import option
from library.errors import UserError
from networks.tools.output import OutputOptions, check_output

if TYPE_CHECKING:
    from torch import Tensor

    from networks.files import AdapterFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """The average"""

    half_life: float | None = option(None, help="weight them exponentially, by this many steps; without it all alike")


COMMAND = Command(
    name="lora-tools ema",
    description=__doc__,
    groups={"ema": EmaOptions, "output": OutputOptions},
    words=(Word("FILE", "files that one run saved", many=True),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    output: OutputOptions = given.groups["output"]
    average(
        [Path(word) for word in given.words],
        output.save_to,
        half_life=given.groups["ema"].half_life,
        save_precision=output.save_precision,
        overwrite=output.overwrite,
    )
    return 0


def average(
    paths: Sequence[Path],
    target: Path,
    *,
    half_life: float | None = None,
    save_precision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the average, with the metadata of the latest file. Raises UserError."""
    from library.record.metadata import step_of
    from networks.tools import result

    if len(paths) < 2:
        raise UserError("ema: one file has no average; give two or more")
    if half_life is not None and not 0 < half_life < float("inf"):
        raise UserError(f"--half_life {half_life:g}: has to be above 0")
    check_output(target, list(paths), overwrite=overwrite)
    sources = result.read(paths, purpose="is averaged", any_kind=True)
    _check_one_run(sources)
    steps = [step_of(path) for path in paths]
    if half_life is not None and (
        lacking := [str(path) for path, step in zip(paths, steps, strict=True) if step is None]
    ):
        raise UserError(f"--half_life: {', '.join(lacking)} has no ss_steps in its metadata: its step is not known")
    weights = weights_of([step or 0 for step in steps], half_life)
    layers = averaged(sources, weights)
    latest = max(range(len(sources)), key=lambda place: (steps[place] or 0, place))
    words = "mean" if half_life is None else f"exponential average, half-life {half_life:g} steps"
    metadata = result.own_metadata(sources[latest]) | result.made_from(sources, weights, words)
    for path, weight in zip(paths, weights, strict=True):
        logger.info("%s counts %.4f", path, weight)
    result.write(target, layers, metadata, result.precision(save_precision, sources))


def weights_of(steps: Sequence[int], half_life: float | None) -> list[float]:
    """The weight of each file, their sum 1."""
    if half_life is None:
        return [1 / len(steps)] * len(steps)
    raw = [2 ** ((step - max(steps)) / half_life) for step in steps]
    return [one / sum(raw) for one in raw]


def averaged(sources: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """The weighted mean of each tensor, fp32. `UserError` for files of other layers, shapes or whole numbers."""
    import torch

    first = sources[0]
    for other in sources[1:]:
        _check_same_tensors(first, other)
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in first.layers.items():
        for end, tensor in layer.tensors.items():
            if end == "alpha" or not tensor.is_floating_point():
                mean = tensor
            else:
                mean = torch.zeros_like(tensor, dtype=torch.float32)
                for source, weight in zip(sources, weights, strict=True):
                    mean.add_(source.layers[name].tensors[end].float(), alpha=weight)
            found.setdefault(name, {})[end] = mean
    return found


def _check_one_run(sources: Sequence[AdapterFile]) -> None:
    sessions = {one.metadata.get("ss_session_id") for one in sources}
    if len(sessions) > 1:
        logger.warning("the files are of different runs (ss_session_id): an average of their factors means little")


def _check_same_tensors(first: AdapterFile, other: AdapterFile) -> None:
    mine, theirs = first.tensors, other.tensors
    if only := sorted(mine.keys() ^ theirs.keys()):
        where = first.source if only[0] in mine else other.source
        raise UserError(f"{only[0]} is only in {where}: files of different layers have no average")
    for key, tensor in mine.items():
        if tensor.shape != theirs[key].shape:
            raise UserError(
                f"{key}: {list(tensor.shape)} in {first.source}, {list(theirs[key].shape)} in {other.source}: "
                "files of different ranks have no average; `merge` adds them"
            )
        whole = key.endswith(".alpha") or not tensor.is_floating_point()
        if whole and not bool((tensor == theirs[key]).all()):
            raise UserError(f"{key}: {tensor.tolist()} in {first.source}, {theirs[key].tolist()} in {other.source}")
