"""Swapped blocks and checkpoints in host memory on a GPU: the same bits, less memory, copies beside the computation."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.offload.checkpoints import OffloadedCheckpoints
from library.offload.lane import CudaLane
from library.offload.swap import Ring, layers_in, swapping_cost
from library.quantization.frozen import compute_frozen
from tests.gpu.conftest import GPU, Trained

pytestmark = pytest.mark.gpu
Train = Callable[..., Trained]

BLOCKS, WIDTH, ROWS = 12, 4096, 16384  # 32 MiB a block in bf16; a product of 0.55 TFLOP


@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="fp32"),
        pytest.param(("--mixed_precision", "bf16"), id="bf16"),
        pytest.param(("--mixed_precision", "bf16", "--base_format", "fp8"), id="fp8"),
        pytest.param(("--mixed_precision", "bf16", "--base_format", "nf4"), id="nf4"),
        pytest.param(("--network_module", "networks.dora"), id="DoRA"),
    ],
)
def test_swapped_blocks_have_the_same_bits(
    on_gpu: Train, words: tuple[str, ...], checkpointing: tuple[str, ...]
) -> None:
    whole = on_gpu("whole", *words, *checkpointing)
    for asked in ("100%", "50%"):
        assert on_gpu(f"swapped_{asked[:-1]}", *words, *checkpointing, "--blocks_to_swap", asked).has_the_bits_of(whole)


@pytest.mark.parametrize("swapped", [(), ("--blocks_to_swap", "100%")])
def test_checkpoints_on_the_host_have_the_same_bits(on_gpu: Train, swapped: tuple[str, ...]) -> None:
    words = ("--mixed_precision", "bf16", "--gradient_checkpointing")
    whole = on_gpu("whole", *words)
    assert on_gpu("away", *words, *swapped, "--cpu_offload_checkpointing").has_the_bits_of(whole)


def stack() -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, device="cpu", dtype=torch.bfloat16) for _ in range(BLOCKS)]
    for layer in layers:
        layer.weight.data.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        layer.requires_grad_(False)
        compute_frozen(layer)
    return layers


def computed(layers: list[nn.Linear], x: Tensor) -> Tensor:
    """The gradient of x."""
    hidden = x
    for layer in layers:
        hidden = layer(hidden)
    return torch.autograd.grad(hidden.float().square().sum(), x)[0]


def seconds(work: Callable[[], object]) -> float:
    """Of a pass, the median of five after two that warm up."""
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found[2:])


@pytest.mark.usefixtures("real_gpu")
def test_copies_run_beside_the_computation() -> None:
    """Where a block computes longer than its copy takes, swapping costs less than half of the copies' time."""
    x = torch.randn(ROWS, WIDTH, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    whole = [layer.to(GPU) for layer in stack()]
    expected, resident = computed(whole, x), seconds(lambda: computed(whole, x))
    for layer in whole:
        layer.to("cpu")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    swapped = stack()
    blocks = [layers_in(layer) for layer in swapped]
    ring, cost = Ring(blocks, CudaLane(GPU)), swapping_cost(blocks)
    assert all(layer.weight.is_pinned() for layer in swapped)
    assert torch.cuda.memory_allocated() - before == cost.buffers == 2 * 2 * WIDTH**2
    assert torch.equal(computed(swapped, x), expected)
    took = seconds(lambda: computed(swapped, x))
    memory, buffer = ring._host[0], torch.empty(len(ring._host[0]), dtype=torch.uint8, device=GPU)
    copies = 2 * (BLOCKS - 2) * seconds(lambda: buffer.copy_(memory, non_blocking=True))
    print(f"resident {resident * 1e3:.1f} ms, swapped {took * 1e3:.1f} ms, its copies alone {copies * 1e3:.1f} ms")
    if copies < 0.8 * resident:
        assert took - resident < 0.5 * copies
    else:
        assert took < resident + copies


@pytest.mark.usefixtures("real_gpu")
def test_checkpoints_on_the_host_are_not_on_the_gpu() -> None:
    """Of twelve inputs of 128 MiB a few are there at one time: those that compute, come and go."""
    layers = [layer.to(GPU) for layer in stack()]
    x = torch.randn(ROWS, WIDTH, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    peaks, gradients = [], []
    by_torch = torch.utils.checkpoint.checkpoint
    for by in (lambda layer, h: by_torch(layer, h, use_reentrant=False), OffloadedCheckpoints(CudaLane(GPU))):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        hidden = x
        for layer in layers:
            hidden = by(layer, torch.nn.functional.gelu(hidden))
        loss = hidden.float().square().sum()
        del hidden
        gradients.append(torch.autograd.grad(loss, x)[0])
        del loss
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert torch.equal(*gradients)
    print(f"peaks {[peak / 2**20 for peak in peaks]} MiB")
    assert peaks[0] - peaks[1] > 4 * x.nbytes
