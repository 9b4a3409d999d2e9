"""CPUs and threads: the number for decoding, hashing and reading, the time that torch's threads spin, and bf16."""

from __future__ import annotations

import os
import sys

MOST_THREADS = 16  # more threads only wait for the disk or for memory


def cpu_count() -> int:
    """The CPUs that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def thread_count() -> int:
    """The threads of a pool."""
    return min(MOST_THREADS, cpu_count())


def spin_briefly() -> None:
    """Reduce the spinning of libgomp's threads, with which torch computes on Linux, while they wait for each other.

    By default a thread spins about 300,000 times before it sleeps, and beside another program on the same cores that
    wastes whole time slices: a step of the quickstart takes 5 times as long as with 10,000 times, and alone as long
    (DECISIONS.md, 2026-11-28; `python -m benchmarks.thread_waiting`). A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the
    user's is kept. No effect once torch is imported.
    """
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def computes_bf16() -> bool:
    """Whether torch's products and convolutions in bf16 have kernels for this CPU (on x86 from AVX-512 on).

    Without them torch falls back to plain loops: on an AVX2 processor with two threads a 3×3 convolution of 320
    channels takes 193 times as long as in fp32, a product of 1024 × 1280 × 1280 7 times (benchmarks/cpu_precisions.py).
    """
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
