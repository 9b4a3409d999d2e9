"""Small problems for an optimizer: a LoRA that learns a linear map, and a bag of odd parameters."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from library.optimizers import CustomAdamW

TECHNIQUES = (
    *("use_spd", "use_cautious", "use_orthogonal_grad", "use_adopt_stability", "use_grams", "use_agr"),
    *("use_tam", "use_alora", "dynamic_weight_decay"),
)
OFF: dict[str, Any] = dict.fromkeys(TECHNIQUES, False)
ON: dict[str, Any] = {**dict.fromkeys(TECHNIQUES, True), "use_grams": False}
Named = list[tuple[str, nn.Parameter]]


def full(params: Any, **options: Any) -> CustomAdamW:
    """With all techniques that go together."""
    return CustomAdamW(params, **{**ON, **options})


def combinations() -> list[dict[str, Any]]:
    """All on/off combinations of the nine but Grams with Cautious: 384."""
    choices = (dict(zip(TECHNIQUES, bits, strict=True)) for bits in product((False, True), repeat=len(TECHNIQUES)))
    return [choice for choice in choices if not (choice["use_grams"] and choice["use_cautious"])]


def label(options: dict[str, Any]) -> str:
    return "+".join(name.removeprefix("use_") for name in TECHNIQUES if options[name]) or "nothing"


class LoraRegression:
    """Two linear layers with LoRA (scale 0.5), whose targets differ from the frozen weights by a low-rank matrix."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 24, rank: int = 4) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        self.inputs = draw(32, width)
        self.truth = [draw(width, rank) @ draw(rank, width) / width for _ in range(2)]
        self.named: Named = []
        for index in range(2):
            self.named.append((f"net.{index}.lora_down.weight", nn.Parameter(draw(rank, width) / width**0.5)))
            self.named.append((f"net.{index}.lora_up.weight", nn.Parameter(torch.zeros(width, rank, dtype=dtype))))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def loss(self) -> Tensor:
        total = torch.zeros((), dtype=self.inputs.dtype)
        for index, truth in enumerate(self.truth):
            down, up = self.parameters[2 * index : 2 * index + 2]
            total = total + ((self.inputs @ down.T @ up.T) * 0.5 - self.inputs @ truth.T).square().mean()
        return total

    def backward(self, scale: float = 1.0) -> float:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        (loss * scale).backward()
        return float(loss.detach())

    def train(self, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.backward(scale))
            optimizer.step()
        return losses

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().double().flatten() for parameter in self.parameters])


def bag(dtype: torch.dtype = torch.float32, seed: int = 0) -> Named:
    """A Linear pair, a convolution pair, and parameters that belong to no pair: a bias, a scalar, one with 5,000."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "a.lora_down.weight": (4, 40),
        "a.lora_up.weight": (64, 4),
        "b.lora_down.weight": (5, 12, 3, 3),
        "b.lora_up.weight": (33, 5, 1, 1),
        "bias": (7,),
        "scalar": (),
        "big": (50, 100),
    }
    return [(name, nn.Parameter((torch.randn(s, generator=g) * 0.1).to(dtype))) for name, s in shapes.items()]


def gradients(named: Named, step: int, *, size: float = 1e-2) -> None:
    """Random gradients that agree from step to step in part; all zero for lora_down in step 0, as in a real LoRA."""
    for index, (name, parameter) in enumerate(named):
        steady = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 + index))
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7919 * step + index))
        grad = (steady + noise) * size * (0 if step == 0 and "lora_down" in name else 1)
        parameter.grad = grad.to(parameter.dtype)


def run(implementation: str, steps: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Named, Any]:
    """The bag after some steps, and its optimizer."""
    named = bag(dtype)
    optimizer = CustomAdamW(named, implementation=implementation, **options)  # type: ignore[arg-type]
    for step in range(steps):
        gradients(named, step)
        optimizer.step()
    return named, optimizer


def flat(named: Named) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for _, parameter in named])


def distance(a: Named, b: Named, start: Named) -> float:
    """How far two results are apart, relative to how far they moved."""
    return float((flat(a) - flat(b)).norm() / (flat(a) - flat(start)).norm())
