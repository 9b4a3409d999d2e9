"""A small fixed computation, which shows whether a machine's arithmetic is that of the expectations."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tests.yardstick.arithmetic import prepare_torch


def write(file: str) -> None:
    prepare_torch()
    Path(file).write_text(json.dumps(canary()), encoding="utf-8")


def canary() -> dict[str, str]:
    """Short hashes of what training is made of. Two machines that agree here give the same bits in every case that
    was tried; one that does not is another yardstick."""
    draw = np.random.default_rng(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.from_numpy((2 * draw.random(shape) - 1).astype(np.float32))

    def hashed(*tensors: torch.Tensor) -> str:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> str:
        inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        output = function(*inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return hashed(output, *torch.autograd.grad((output.float() * weights).sum(), inputs))

    x = numbers(4001)
    found = {
        name: hashed(getattr(torch, name)(x.abs()))
        for name in ("exp", "log1p", "sin", "cos", "sqrt", "rsqrt", "tanh", "erf")
    }
    found["power"] = hashed(x.abs() ** 0.37)
    found["sum"] = hashed(x.sum(), numbers(50, 70).sum(0), numbers(50, 70).mean(1), torch.linalg.vector_norm(x))
    found["random"] = hashed(*(torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 40)))
    for kind in (torch.float32, torch.bfloat16):

        def of(*shape: int, kind: torch.dtype = kind) -> torch.Tensor:
            return numbers(*shape).to(kind)

        name = str(kind).removeprefix("torch.")
        found[f"matmul {name}"] = both_ways(torch.matmul, of(64, 48), of(48, 97))
        found[f"linear {name}"] = both_ways(F.linear, of(2, 77, 64), of(96, 64), of(96))
        found[f"conv {name}"] = both_ways(
            lambda *given: F.conv2d(*given, padding=1), of(2, 48, 16, 16), of(64, 48, 3, 3), of(64)
        )
        found[f"conv1 {name}"] = both_ways(F.conv2d, of(1, 48, 8, 8), of(32, 48, 1, 1), of(32))
        found[f"attention {name}"] = both_ways(F.scaled_dot_product_attention, *(of(2, 4, n, 16) for n in (64, 77, 77)))
        found[f"norms {name}"] = both_ways(
            lambda *given: F.group_norm(given[0], 8, *given[1:]), of(2, 48, 8, 8), of(48), of(48)
        )
        found[f"activations {name}"] = both_ways(lambda a: F.silu(a) + F.gelu(a), of(3, 999))
    parameter = torch.nn.Parameter(numbers(40, 31))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = numbers(40, 31)
        optimizer.step()
    found["AdamW"] = hashed(parameter)
    square = draw.random((50, 50)).astype(np.float32)
    found["numpy"] = hashlib.sha256(
        b"".join(a.tobytes() for a in (square @ square, np.exp(square), square.sum(0)))
    ).hexdigest()[:12]
    libm = [f(i / 97) for i in range(1, 300) for f in (math.exp, math.log, math.sin, math.cos, lambda v: v**0.3)]
    found["Python"] = hashlib.sha256(repr([*libm, sum(libm)]).encode()).hexdigest()[:12]
    return found
