"""Adding a LoRA's product to a weight as merging does it: in blocks of rows that stay in the processor's cache, beside
the whole weight at once, which other kinds and methods need.

    python -m benchmarks.merge_rows --threads 1            # a quarter of a minute

Prints a Markdown table: nanoseconds for each number of the weight, and the ratio within each pair.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import header, interleaved, row
from library.files.tensors import TensorEntry
from library.models.checkpoints import rewrite

RANK, MULTIPLIER = 64, 0.5
SHAPES = {"10240 × 1280": (10240, 1280), "1280 × 1280": (1280, 1280), "1280 × 1280 × 3 × 3": (1280, 1280, 3, 3)}


def both_ways(shape: tuple[int, ...]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions that merge into an fp16 weight of this shape, read, checked and rounded as in `rewrite`."""
    weight = torch.randn(shape).half()
    up, down = torch.randn(shape[0], RANK), torch.randn(RANK, weight.numel() // shape[0])

    def add(rows: Tensor, start: int) -> None:
        rows.addmm_(up[start : start + len(rows)], down, alpha=MULTIPLIER)

    def whole(matrix: Tensor) -> Tensor:
        add(matrix.view(shape[0], -1), 0)
        return matrix

    entry = TensorEntry(Path("weight"), 0, "float16", shape)  # of no file: nothing is read here
    patch = rewrite.Patch(entry, shape, whole)
    place = weight.clone()
    return lambda: rewrite._change_rows("weight", place, patch, add), lambda: rewrite._changed("weight", weight, patch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="pairs of runs for each row (default: 11)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, rank {RANK}, fp16\n\n{header('by rows, ns', 'at once, ns')}")
    for name, shape in SHAPES.items():
        comparison = interleaved(*both_ways(shape), pairs=options.pairs)
        print(row(name, comparison, unit=1e9 / math.prod(shape), digits=2), flush=True)


if __name__ == "__main__":
    main()
