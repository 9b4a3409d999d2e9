"""Measures CustomAdamW and its techniques on the tensors of a network of yours: the time of a step, bytes of state.

    python -m library.optimizers.profile output/quickstart.safetensors
    python -m library.optimizers.profile lora.safetensors --optimizer AdamW8bit pytorch_optimizer.CAME --rounds 40

Only the names and shapes in the file's header count. In every round each optimizer makes one step, so that disturbances
of the machine affect all alike; the ratio is the median over the rounds of time / time of torch's AdamW in that round.
`measure` does the same for the parameters of a program of yours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library import log
from library.config.registry import Arguments
from library.errors import UserError
from library.files.index import read_index
from library.optimizers.create import OptimizerChoice, choose_optimizer, create_optimizer, tensor_bytes
from library.optimizers.custom_adamw.techniques import TECHNIQUES, techniques

BASELINE = "AdamW (torch)"
Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Row:
    """`milliseconds`: the median of a step. `ratio`: to the baseline. `bytes_per_parameter`: of state."""

    name: str
    milliseconds: float
    ratio: float
    bytes_per_parameter: float


def parameters_of(file: Path, device: torch.device) -> Named:
    """Parameters of the shapes in a file of weights; scalars, such as alphas, are left out. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    draws = torch.Generator().manual_seed(0)
    shapes = {name: entry.shape for name, entry in read_index(file).entries.items() if len(entry.shape) > 0}
    if not shapes:
        raise UserError(f"{file}: holds no tensors with a size")
    values = {name: 1e-2 * torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return [(name, nn.Parameter(value.to(device))) for name, value in values.items()]


def contenders(others: Iterable[str] = ()) -> dict[str, OptimizerChoice]:
    """torch's AdamW, CustomAdamW with nothing, as shipped, and with each technique alone, then the `others` by name."""
    off: Arguments = dict.fromkeys(TECHNIQUES, False)
    custom = partial(choose_optimizer, "CustomAdamW", [])
    found = {
        BASELINE: choose_optimizer("AdamW", ["fused=True"]),
        "CustomAdamW, nothing on, 32 bits": custom(custom_adamw={**off, "optim_bits": 32}),
        "CustomAdamW, nothing on": custom(custom_adamw=off),
        "CustomAdamW as shipped": custom(),
    }
    for kind in techniques():
        switch = kind.switch().name
        found[f"{kind.name} alone"] = custom(custom_adamw={**off, switch: True})
    return found | {name: choose_optimizer(name, []) for name in others}


def measure(named: Named, chosen: Mapping[str, OptimizerChoice], *, rounds: int = 20) -> list[Row]:
    """A row for each choice, of which one is BASELINE. The parameters and gradients, which are made, change. Raises
    UserError for an optimizer whose step needs more than gradients."""
    draws = torch.Generator().manual_seed(1)
    for _, parameter in named:
        parameter.grad = (1e-3 * torch.randn(parameter.shape, generator=draws)).to(parameter)
    numbers = sum(parameter.numel() for _, parameter in named)
    group, rate = _group(named), 1e-6
    optimizers = {name: create_optimizer(choice, [{**group}], learning_rate=rate) for name, choice in chosen.items()}
    for name, optimizer in [*optimizers.items()] * 2:  # the first compile and allocate; ADOPT moves from the second on
        try:
            optimizer.step()
        except TypeError as error:  # LBFGS wants a closure
            raise UserError(f"{name}: its step cannot be measured: {error}") from None
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for count in range(rounds):
        for name in list(optimizers) if count % 2 else reversed(optimizers):
            times[name].append(_timed(optimizers[name], named[0][1].device))
    base = times[BASELINE]
    return [
        Row(
            name,
            1e3 * statistics.median(own),
            statistics.median(mine / plain for mine, plain in zip(own, base, strict=True)),
            tensor_bytes(optimizers[name].state) / numbers,
        )
        for name, own in times.items()
    ]


def _group(named: Named) -> dict[str, object]:
    names, parameters = zip(*named, strict=True)
    return {"params": [*parameters], "param_names": [*names], "lr": 1e-6, "name": "all"}


def _timed(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    optimizer.step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Iterable[Row]) -> str:
    """As Markdown."""
    lines = ["| optimizer | ms a step | ratio to AdamW | bytes of state a number |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.name} | {row.milliseconds:.2f} | {row.ratio:.2f} | {row.bytes_per_parameter:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m library.optimizers.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a LoRA or other weights: their names and shapes are used")
    parser.add_argument("--optimizer", nargs="+", default=[], metavar="NAME", help="further ones, as --optimizer_type")
    parser.add_argument("--rounds", type=_rounds, default=20, help="steps of each that are measured (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: the GPU)")
    given = parser.parse_args(argv)
    try:
        with log.errors_only():
            _report(given.file, given.optimizer, _device(given.device), rounds=given.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _rounds(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number of at least 1")
    return int(word)


def _device(name: str) -> torch.device:
    """Raises UserError for one that does not exist, here or at all."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # of a torch without CUDA
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _report(file: Path, further: Sequence[str], device: torch.device, *, rounds: int) -> None:
    named = parameters_of(file, device)
    chosen = contenders(further)
    numbers = sum(parameter.numel() for _, parameter in named)
    print(f"{file}: {len(named)} tensors, {numbers:,} numbers; {rounds} rounds on {device}\n")
    print(table(measure(named, chosen, rounds=rounds)))


if __name__ == "__main__":
    sys.exit(main())
