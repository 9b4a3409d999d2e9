"""With everything off: torch's AdamW bit for bit, in the kernel its fused form closely; bitsandbytes' AdamW8bit too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adamw_problems import OFF, LoraRegression, bag, distance, flat, gradients
from torch import nn

from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw import native


def kernel_is_there() -> bool:
    try:
        native.library()
    except native.Unavailable:
        return False
    return True


NEEDS_KERNEL = pytest.mark.skipif(not kernel_is_there(), reason="no C++ compiler")


def results(make: Any, dtype: torch.dtype, steps: int = 20) -> torch.Tensor:
    named = bag(dtype)
    optimizer = make(named)
    for step in range(steps):
        gradients(named, step)
        if step % 5 == 3:
            named[4][1].grad = None  # its own count of steps falls behind
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step)
        optimizer.step()
    return flat(named)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [True, False])
def test_the_bits_of_torchs_adamw(weight_decay: float, betas: Any, dtype: torch.dtype, foreach: bool) -> None:
    """The same operations of torch in the same order, each number by itself: what the CPU is does not matter."""
    common: dict[str, Any] = {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay}
    theirs = results(lambda named: torch.optim.AdamW([p for _, p in named], foreach=foreach, **common), dtype)
    ours = results(lambda named: CustomAdamW(named, optim_bits=32, implementation="eager", **common, **OFF), dtype)
    assert torch.equal(ours, theirs)


@NEEDS_KERNEL
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5)])
def test_the_kernel_rounds_as_torchs_fused_adamw(weight_decay: float, betas: Any) -> None:
    """Two programs. torch's is compiled for several kinds of CPU: with AVX2 or AVX-512 it fuses the same products with
    the same sums, but for the last n mod 16 numbers of a tensor, and on an older CPU none (9e-8 measured)."""
    common: dict[str, Any] = {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay}
    theirs = results(lambda named: torch.optim.AdamW([p for _, p in named], fused=True, **common), torch.float32)
    ours = results(
        lambda named: CustomAdamW(named, optim_bits=32, implementation="native", **common, **OFF), torch.float32
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-7)  # weights of up to 0.6: ten roundings of 3e-8


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_close_to_bitsandbytes(implementation: Any) -> None:
    """100 steps of a LoRA: the weights end within 3 % of the distance moved (1.6 measured), the losses within 5 %.

    The same maps, but bitsandbytes' CPU routine does not always round to the nearest entry; against float32 moments
    ours is not further away than theirs is.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def train(make: Any) -> tuple[LoraRegression, float]:
        problem = LoraRegression(width=256, rank=16)
        losses = problem.train(make(problem), 100)
        return problem, losses[-1]

    theirs, loss = train(lambda p: bitsandbytes.optim.AdamW8bit(p.parameters, lr=1e-3, weight_decay=1e-2))
    ours, our_loss = train(lambda p: CustomAdamW(p.named, lr=1e-3, implementation=implementation, **OFF))
    exact, _ = train(lambda p: torch.optim.AdamW(p.parameters, lr=1e-3, weight_decay=1e-2))
    start = LoraRegression(width=256, rank=16).named
    apart = distance(ours.named, theirs.named, start)
    print(
        f"relative distance to bitsandbytes {apart:.4f}; to float32: {distance(ours.named, exact.named, start):.4f}, "
        f"theirs {distance(theirs.named, exact.named, start):.4f}"
    )
    assert apart < 0.03
    assert our_loss == pytest.approx(loss, rel=0.05)
    assert distance(ours.named, exact.named, start) < 1.2 * distance(theirs.named, exact.named, start)


def test_bfloat16_weights_keep_float32_moments() -> None:
    """In bfloat16 0.999 v is v: the second moment would never decay."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = CustomAdamW([("x", parameter)], optim_bits=32, **OFF)
    for size in (1.0, *[0.0] * 30):
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    v = optimizer.state[parameter]["exp_avg_sq"]
    assert v.dtype == torch.float32
    assert float(v[0]) == pytest.approx(0.001 * 0.999**30, rel=1e-5)
