"""What a CPU makes of 16 bits: the operations of a denoiser in bf16 and fp16, beside fp32.

    python -m benchmarks.cpu_precisions            # a minute; several where torch has no kernels for bf16

Prints a Markdown table: milliseconds, and their ratio to fp32 within each pair of runs. Sizes of one image at 256 px.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import header, interleaved, row


def operations(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A 3×3 convolution, a linear layer and attention of SD 1.5's first, third and second block."""
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    image, kernel = drawn(1, 320, 32, 32), drawn(320, 320, 3, 3)
    tokens, weight = drawn(1024, 1280), drawn(1280, 1280)
    query, key, value = (drawn(1, 8, 1024, 40) for _ in range(3))
    return {
        "convolution 3 × 3, 320 channels, 32 × 32": partial(F.conv2d, image, kernel, padding=1),
        "product 1024 × 1280 × 1280": partial(F.linear, tokens, weight),
        "attention, 8 heads of 40, 1024 tokens": partial(F.scaled_dot_product_attention, query, key, value),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs for each row (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    print(f"{options.threads} threads; bf16 kernels: {'yes' if kernels else 'no'}\n\n{header('ms', 'fp32, ms')}")
    plain = operations(torch.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for operation, ours in operations(dtype).items():
            comparison = interleaved(ours, plain[operation], pairs=options.pairs, warmup=1)
            print(row(f"{operation}, {name}", comparison, unit=1e3, digits=2), flush=True)


if __name__ == "__main__":
    main()
