"""Cut a LoRA to a lower rank: to a number, or for each layer by its singular values.

python -m networks.tools resize fox.safetensors --rank 8 --save_to fox8.safetensors
python -m networks.tools resize fox.safetensors --rank 32 --dynamic_method sv_fro --dynamic_param 0.95 --save_to …

The dynamic methods keep as few singular values as satisfy their condition, at most --rank and at least 1:
sv_ratio       those above the largest / parameter
sv_fro         until their Frobenius norm reaches the share "parameter" of the whole
sv_cumulative  until their sum reaches the share "parameter" of the sum of all
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.config.command import Command, Word, read
from library.config.fields import REQUIRED, option
from library.errors import UserError
from library.progress import bar
from networks.tools.output import OutputOptions, check_output

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Dynamic = Literal["sv_ratio", "sv_fro", "sv_cumulative"]


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """The new rank"""

    rank: int = option(REQUIRED, minimum=1, help="the new rank; with --dynamic_method the highest")
    conv_rank: int | None = option(None, minimum=1, help="that of convolutions wider than 1 × 1; without it --rank")
    dynamic_method: Dynamic | None = option(None, help="choose the rank of each layer by its singular values")
    dynamic_param: float | None = option(None, help="the method's parameter")
    verbose: bool = option(False, help="print rank and kept energy of each layer")


COMMAND = Command(
    name="lora-tools resize",
    description=__doc__,
    groups={"resize": ResizeOptions, "output": OutputOptions},
    words=(Word("FILE", "the LoRA file"),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options, output = given.groups["resize"], given.groups["output"]
    resize(
        Path(given.words[0]),
        output.save_to,
        rank=options.rank,
        conv_rank=options.conv_rank,
        method=options.dynamic_method,
        parameter=options.dynamic_param,
        verbose=options.verbose,
        save_precision=output.save_precision,
        overwrite=output.overwrite,
    )
    return 0


def resize(
    path: Path,
    target: Path,
    *,
    rank: int,
    conv_rank: int | None = None,
    method: str | None = None,
    parameter: float | None = None,
    verbose: bool = False,
    save_precision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a LoRA of lower rank, and print the kept energy. Raises UserError."""
    from networks.tools import result
    from networks.tools.low_rank import Factors

    _check(method, parameter)
    check_output(target, [path], overwrite=overwrite)
    (source,) = result.read([path], purpose="is resized")
    layers, kept, whole = {}, 0.0, 0.0
    for name, factors in bar(list(result.factors(source).items()), desc="resizing", unit="layer"):
        left, values, right = factors.decomposed()
        most = (conv_rank or rank) if factors.spatial else rank
        count = min(most, len(values), count_of(values, method, parameter))
        root = values[:count].sqrt()
        layers[name] = Factors(left[:, :count] * root, root[:, None] * right[:count], factors.shape).tensors()
        energies = values.double().square()
        kept, whole = kept + float(energies[:count].sum()), whole + float(energies.sum())
        if verbose:
            share = float(energies[:count].sum() / energies.sum()) if energies.any() else 1.0
            print(f"{name}: rank {factors.rank} to {count}, {100 * share:.2f} % of the energy")
    print(f"kept {100 * kept / whole if whole else 100:.2f} % of the energy (squared Frobenius norm)")
    words = f"resize to rank {rank}" + (f", {method} {parameter:g}" if method and parameter is not None else "")
    metadata = result.own_metadata(source) | result.about_ranks(layers) | result.made_from([source], [1.0], words)
    result.write(target, layers, metadata, result.precision(save_precision, [source]))


def _check(method: str | None, parameter: float | None) -> None:
    if method is None:
        if parameter is not None:
            raise UserError("--dynamic_param has no effect without --dynamic_method")
        return
    if parameter is None:
        raise UserError(f"--dynamic_method {method}: needs a --dynamic_param")
    if method == "sv_ratio" and not 1 <= parameter < float("inf"):
        raise UserError(f"--dynamic_param {parameter:g}: sv_ratio takes 1 or more, usual are 2 to 20")
    if method != "sv_ratio" and not 0 < parameter <= 1:
        raise UserError(f"--dynamic_param {parameter:g}: {method} takes a share above 0, up to 1")


def count_of(values: Tensor, method: str | None, parameter: float | None) -> int:
    """How many singular values a dynamic method keeps, at least 1; all of them without one."""
    if method is None or parameter is None:
        return len(values)
    if method == "sv_ratio":
        return max(1, int((values > values[0] / parameter).sum()))
    terms = values.double() ** (2 if method == "sv_fro" else 1)
    share = parameter**2 if method == "sv_fro" else parameter
    # the sums of all before each: a value is kept while they have not reached the share
    before = terms.cumsum(0) - terms
    return max(1, int((before < share * terms.sum() * (1 - 1e-12)).sum()))
