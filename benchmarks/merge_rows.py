"""Adding a LoRA's product to a weight: in blocks of rows that stay in the processor's cache, beside the whole at once.

    python -m benchmarks.merge_rows --threads 1            # a quarter of a minute

Prints a Markdown table: nanoseconds for each number of the weight, and the ratio within each pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import header, interleaved, row
from library.models.checkpoints.rewrite import BLOCK

RANK = 64
SHAPES = {"10240 × 1280": (10240, 1280), "1280 × 1280": (1280, 1280), "1280 × 1280 × 3 × 3": (1280, 11520)}


def by_rows(weight: Tensor, up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    """fp16 to fp16, through fp32 rows."""
    step = max(1, BLOCK // weight.shape[1])

    def work() -> Tensor:
        out = torch.empty_like(weight)
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].float()
            rows.addmm_(up[start : start + step], down, alpha=0.5)
            out[start : start + step] = rows
        return out

    return work


def at_once(weight: Tensor, up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    return lambda: (weight.float() + 0.5 * (up @ down)).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="pairs of runs for each row (default: 11)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, rank {RANK}, fp16\n\n{header('by rows, ns', 'at once, ns')}")
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns).half()
        factors = torch.randn(rows, RANK), torch.randn(RANK, columns)
        comparison = interleaved(by_rows(weight, *factors), at_once(weight, *factors), pairs=options.pairs)
        print(row(name, comparison, unit=1e9 / weight.numel(), digits=2), flush=True)


if __name__ == "__main__":
    main()
