"""The whole optimizer against others' code, or against the published algorithm written down here, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adamw_problems import OFF, LoraRegression, Named, flat, gradients
from torch import Tensor, nn

from library.optimizers import CustomAdamW

STEPS = 40
CLOSE = 1e-12  # of the distance moved


def parameters() -> Named:
    g = torch.Generator().manual_seed(3)
    shapes = {"x.lora_down.weight": (4, 30), "x.lora_up.weight": (21, 4), "other": (13, 5)}
    return [(name, nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64))) for name, s in shapes.items()]


def follow(make: Callable[[Named], Any], gradient_size: float = 1e-2) -> Named:
    """Forty steps with the same gradients, none of them zero."""
    named = parameters()
    optimizer = make(named)
    for step in range(1, STEPS + 1):
        gradients(named, step, size=gradient_size)
        optimizer.step()
    return named


def ours(**options: Any) -> Callable[[Named], Any]:
    return lambda named: CustomAdamW(named, **{**OFF, "weight_decay": 0.0, **options})


def theirs(name: str, **options: Any) -> Callable[[Named], Any]:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    return lambda named: getattr(pytorch_optimizer, name)([p for _, p in named], **options)


def assert_same(a: Named, b: Named) -> None:
    moved = (flat(a) - flat(parameters())).norm()
    assert moved > 1e-3
    assert float((flat(a) - flat(b)).norm() / moved) < CLOSE


class TestAgainstPytorchOptimizer:
    def test_adopt(self) -> None:
        # its count is one ahead of the paper's in the clip
        peer = theirs("ADOPT", lr=1e-3, betas=(0.9, 0.99), clip_lambda=lambda step: (step - 1) ** 0.25, foreach=False)
        assert_same(follow(ours(use_adopt_stability=True, betas=(0.9, 0.99))), follow(peer))

    def test_grams(self) -> None:
        peer = theirs("Grams", lr=1e-3, betas=(0.9, 0.99), eps=1e-6)
        assert_same(follow(ours(use_grams=True, betas=(0.9, 0.99), eps=1e-6)), follow(peer))

    def test_orthograd(self) -> None:
        optimizers = pytest.importorskip("pytorch_optimizer")

        def peer(named: Named) -> Any:
            values = [parameter for _, parameter in named]
            return optimizers.OrthoGrad(torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0), foreach=False)

        assert_same(follow(ours(use_orthogonal_grad=True, orthograd_target="all")), follow(peer))


class Published:
    """Adam with two places to fill in: what happens to the gradient, and to the update and the new weights."""

    def __init__(self, named: Named, *, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.values = [parameter for _, parameter in named]
        self.lr, self.weight_decay, self.t = lr, weight_decay, 0
        self.m = [torch.zeros_like(p) for p in self.values]
        self.v = [torch.zeros_like(p) for p in self.values]

    def gradient(self, p: Tensor, g: Tensor) -> Tensor:
        return g

    def entering(self, index: int, g: Tensor) -> Tensor:
        return g

    def update(self, u: Tensor, g: Tensor) -> Tensor:
        return u

    def project(self, new: Tensor, old: Tensor, g: Tensor) -> Tensor:
        return new

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for index, p in enumerate(self.values):
            assert p.grad is not None
            g = self.gradient(p, p.grad)
            self.m[index] = 0.9 * self.m[index] + 0.1 * self.entering(index, g)
            self.v[index] = 0.999 * self.v[index] + 0.001 * g * g
            corrected = self.v[index] / (1 - 0.999**self.t)
            u = self.update(self.m[index] / (1 - 0.9**self.t) / (corrected.sqrt() + 1e-8), g)
            new = p - self.lr * self.weight_decay * p - self.lr * u
            p.copy_(self.project(new, p.clone(), p.grad))


class AdamSPD(Published):
    """The authors' code with `pre=None`: the deviation is that of the weights themselves (lambda 0.5)."""

    def project(self, new: Tensor, old: Tensor, g: Tensor) -> Tensor:
        condition = -(g * old).sum()
        if condition >= 0:
            return new
        ratio = ((new.norm() - old.norm()) / new.norm()).clamp(0, 1)
        return new - 0.5 * ratio * new


class CautiousAdamW(Published):
    """c_adamw.py, the single-tensor path."""

    def update(self, u: Tensor, g: Tensor) -> Tensor:
        mask = (u * g > 0).to(g.dtype)
        return u * (mask / mask.mean().clamp(min=1e-3))


class AdamWAGR(Published):
    """AdamW_AGR.py."""

    def gradient(self, p: Tensor, g: Tensor) -> Tensor:
        return g * (1 - g.abs() / g.abs().sum())


class AdaTAM(Published):
    """Algorithm 2 of the paper, with Adam's (1 - beta1)."""

    def __init__(self, named: Named) -> None:
        super().__init__(named)
        self.s = [0.0] * len(self.values)

    def entering(self, index: int, g: Tensor) -> Tensor:
        m = self.m[index]
        correlation = float(nn.functional.cosine_similarity(m.flatten(), g.flatten(), dim=0)) if m.any() else 0.0
        self.s[index] = 0.9 * self.s[index] + 0.1 * correlation
        return (1e-8 + (1 + self.s[index]) / 2) * g


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({"use_spd": True, "spd_lambda": 0.5}, AdamSPD),
        ({"use_cautious": True}, CautiousAdamW),
        ({"use_agr": True}, AdamWAGR),
        ({"use_tam": True}, AdaTAM),
    ],
)
def test_against_the_published_algorithm(options: dict[str, Any], published: Callable[[Named], Any]) -> None:
    assert_same(follow(ours(**options)), follow(published))


def test_alora_is_a_rate_for_each_row() -> None:
    """One plain Adam step, times ratio / sqrt(1 + eta^2 alpha/r ||(BA)_i||), with BA multiplied out."""
    named = parameters()
    before = [parameter.detach().clone() for _, parameter in named]
    optimizer = CustomAdamW([{"params": named, "lora_scale": 0.25}], **{**OFF, "use_alora": True, "weight_decay": 0.0})
    gradients(named, 1)
    optimizer.step()
    plain = parameters()
    gradients(plain, 1)
    torch.optim.AdamW([p for _, p in plain], lr=1e-3, weight_decay=0.0).step()
    moved = [(p.detach() - old) for (_, p), old in zip(named, before, strict=True)]
    usual = [(p.detach() - old) for (_, p), old in zip(plain, before, strict=True)]
    rows = [2.0 / math.sqrt(1 + 4.0 * 0.25 * float(row.norm())) for row in before[1] @ before[0]]
    usual[1] *= torch.tensor(rows, dtype=torch.float64)[:, None]
    torch.testing.assert_close(moved, usual, rtol=1e-12, atol=0)


class TestLoraPlus:
    """The rates of lora_up and lora_down are `ratio` apart exactly once, whoever brings the ratio."""

    def ratio(self, groups: list[dict[str, Any]], **options: Any) -> float:
        named = [named for group in groups for named in group["params"]]
        before = {name: parameter.detach().clone() for name, parameter in named}
        optimizer = CustomAdamW(groups, **{**OFF, "weight_decay": 0.0, **options})
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)  # Adam's first step then has the size of the rate
        optimizer.step()
        moved = {name: float((parameter.detach() - before[name]).abs().mean()) for name, parameter in named}
        return moved["net.0.lora_up.weight"] / moved["net.0.lora_down.weight"]

    def halves(self) -> tuple[Named, Named]:
        named = LoraRegression(dtype=torch.float64).named
        return [(n, p) for n, p in named if "down" in n], [(n, p) for n, p in named if "up" in n]

    def test_alora_brings_it_across_groups(self) -> None:
        down, up = self.halves()
        groups = [{"params": down, "lr": 1e-3}, {"params": up, "lr": 1e-3}]
        assert self.ratio(groups, use_alora=True, alora_ratio=3.0) == pytest.approx(3.0, rel=1e-6)

    def test_the_group_brings_it(self) -> None:
        down, up = self.halves()
        groups = [{"params": down, "lr": 1e-3}, {"params": up, "lr": 5e-3, "lora_plus_ratio": 5.0}]
        assert self.ratio(groups, use_alora=True, alora_ratio=3.0) == pytest.approx(5.0, rel=1e-6)

    def test_weight_decay_keeps_the_plain_rate(self) -> None:
        _, up = self.halves()
        down = [(n.replace("up", "down"), nn.Parameter(torch.zeros(4, 24, dtype=torch.float64))) for n, _ in up]
        for _, parameter in up:
            torch.nn.init.ones_(parameter)
        optimizer = CustomAdamW([*down, *up], lr=0.1, weight_decay=0.5, **{**OFF, "use_alora": True})
        for _, parameter in [*down, *up]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.allclose(up[0][1], torch.full_like(up[0][1], 0.95))
