"""Muon's orthogonalised momentum: its closed form, its invariants, its state, and the kernel beside the plain step."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from adamw_problems import OFF, LoraRegression, Named, bag, distance, flat, gradients, run
from torch import Tensor, nn

from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw import native
from library.optimizers.custom_adamw.techniques.orthogonalize import orthogonal

MUON: dict[str, Any] = {**OFF, "orthogonalize": True, "min_8bit_size": 0, "lr": 1e-2}
COMPANIONS = ("use_agr", "use_orthogonal_grad", "use_tam", "use_cautious", "use_alora", "use_spd")

try:
    native.library()
    KERNEL = True
except native.Unavailable:
    KERNEL = False


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(x: Tensor) -> Tensor:
    """U p(S) V^T: the five steps of the polynomial on the singular values of x / ||x||."""
    u, s, v = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s) @ v


class TestOrthogonal:
    @pytest.mark.parametrize("shape", [(4, 40), (40, 4), (7, 7), (1, 9), (9, 1)])
    def test_it_is_the_polynomial_of_the_singular_values(self, shape: tuple[int, int]) -> None:
        x = drawn(*shape)
        assert torch.allclose(orthogonal(x[None])[0], by_singular_values(x), rtol=1e-9, atol=1e-12)

    def test_singular_values_come_near_one(self) -> None:
        """From a five-hundredth of the largest on; below, they grow by 3.4445 in each of five steps."""
        u, _ = torch.linalg.qr(drawn(8, 8))
        v, _ = torch.linalg.qr(drawn(30, 8, seed=1))
        s = torch.logspace(-2.5, 0, 8, dtype=torch.float64)
        found = torch.linalg.svdvals(orthogonal(((u * s) @ v.T)[None])[0])
        assert 0.68 < found.min() < found.max() < 1.21

    def test_neither_its_size_nor_its_axes_matter(self) -> None:
        x = drawn(5, 20)
        q, _ = torch.linalg.qr(drawn(5, 5, seed=1))
        plain = orthogonal(x[None])
        for size in (1e-30, 1e-3, 1e30):
            assert torch.allclose(orthogonal((x * size).float()[None]).double(), plain, atol=1e-5)
        assert torch.allclose(orthogonal((q @ x)[None]), q @ plain, rtol=1e-9, atol=1e-12)

    def test_zeros_stay_and_what_is_no_number_shows(self) -> None:
        assert not orthogonal(torch.zeros(2, 3, 4)).any()
        broken = torch.ones(1, 3, 4)
        broken[0, 1, 1] = torch.nan
        assert orthogonal(broken).isnan().any()


def follow(make: Any, steps: int = 12) -> Named:
    shapes = {"x.lora_down.weight": (4, 30), "x.lora_up.weight": (21, 4), "other": (13, 5)}
    named = [(name, nn.Parameter(drawn(*shape, seed=i))) for i, (name, shape) in enumerate(shapes.items())]
    optimizer = make(named)
    for step in range(1, steps + 1):
        gradients(named, step)
        optimizer.step()
    return named


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_is_the_published_one(nesterov: bool) -> None:
    lr, decay, beta = 0.02, 0.1, 0.9
    ours = follow(
        lambda named: CustomAdamW(
            named, **{**MUON, "lr": lr, "weight_decay": decay, "orthogonalize_nesterov": nesterov}
        )
    )

    class Published:
        def __init__(self, named: Named) -> None:
            self.named, self.m = named, [torch.zeros_like(p) for _, p in named]

        @torch.no_grad()
        def step(self) -> None:
            for index, (_, p) in enumerate(self.named):
                assert p.grad is not None
                m = self.m[index] = beta * self.m[index] + (1 - beta) * p.grad
                y = beta * m + (1 - beta) * p.grad if nesterov else m
                p.mul_(1 - lr * decay).sub_(lr * 0.5 * max(p.shape) ** 0.5 * by_singular_values(y))

    assert torch.allclose(flat(ours), flat(follow(Published)), rtol=1e-9, atol=1e-12)


def test_it_is_another_packages() -> None:
    """pytorch_optimizer's Muon works in bfloat16, whose rounding the five steps amplify: directions agree to 2 %."""
    optimizers = pytest.importorskip("pytorch_optimizer")

    def peer(named: Named) -> Any:
        group = {"params": [p for _, p in named], "use_muon": True, "lr": 1e-2, "weight_decay": 0.0}
        return optimizers.Muon([group], momentum=0.9, nesterov=True, use_adjusted_lr=False, foreach=False)

    start = follow(lambda named: torch.optim.SGD([p for _, p in named], lr=0.0))
    ours = follow(lambda named: CustomAdamW(named, **{**MUON, "weight_decay": 0.0}), steps=1)
    theirs = follow(peer, steps=1)
    for (_, a), (_, b), (_, s) in zip(ours, theirs, start, strict=True):
        cosine = torch.nn.functional.cosine_similarity((a - s).flatten(), (b - s).flatten(), dim=0)
        assert cosine > 0.98


@pytest.mark.skipif(not KERNEL, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [32, 8])
def test_the_kernel_agrees_with_everything_that_goes_along(bits: Any) -> None:
    """Measured: 6e-7 in fp32, with the five steps on r x r matrices in double; 3e-4 with weights rounded to bf16."""
    for choice in itertools.product((False, True), repeat=len(COMPANIONS)):
        options = {**MUON, **dict(zip(COMPANIONS, choice, strict=True)), "optim_bits": bits, "orthograd_target": "all"}
        ours, optimizer = run("native", 3, **options)
        assert optimizer.get_optimization_info()["implementation"] == ["native CPU kernel"]
        apart = distance(ours, run("eager", 3, **options)[0], bag())
        assert apart < (2e-6 if bits == 32 else 1e-3), f"{choice}: {apart:.1e}"
    half = {**MUON, "optim_bits": bits}
    ours, theirs = (run(name, 6, dtype=torch.bfloat16, **half)[0] for name in ("native", "eager"))
    assert distance(ours, theirs, bag(torch.bfloat16)) < 2e-3


@pytest.mark.skipif(not KERNEL, reason="no C++ compiler")
def test_a_wide_square_goes_to_the_plain_step() -> None:
    named = [("x", nn.Parameter(drawn(150, 150).float())), ("y", nn.Parameter(drawn(128, 200).float()))]
    optimizer = CustomAdamW(named, **MUON)
    gradients(named, 1)
    optimizer.step()
    assert optimizer.get_optimization_info()["implementation"] == ["native CPU kernel", "plain torch operations"]


def test_the_state_is_one_moment_of_a_byte() -> None:
    named = LoraRegression(width=300, rank=16).named
    optimizer = CustomAdamW(named, **MUON)
    gradients(named, 1)
    optimizer.step()
    assert "exp_avg_sq" not in optimizer.state[named[0][1]]
    assert optimizer.get_optimization_info()["bytes_per_parameter"] <= 1.06


@pytest.mark.parametrize("bits", [32, 8])
def test_a_resume_continues_the_same_bits(bits: Any) -> None:
    options = {**MUON, "optim_bits": bits, "use_cautious": True, "use_spd": True}
    whole, broken = bag(), bag()
    optimizers = [CustomAdamW(named, **options) for named in (whole, broken)]
    for step in range(8):
        gradients(whole, step)
        optimizers[0].step()
    for step in range(8):
        if step == 3:
            state = optimizers[1].state_dict()
            optimizers[1] = CustomAdamW(broken, **options)
            optimizers[1].load_state_dict(state)
        gradients(broken, step)
        optimizers[1].step()
    assert torch.equal(flat(whole), flat(broken))


def test_states_of_adamw_and_muon_load_into_each_other(caplog: pytest.LogCaptureFixture) -> None:
    """To Muon: the first moment goes on. From it: both moments start again, and it is said."""
    named = bag()
    optimizers = {on: CustomAdamW(named, **{**MUON, "orthogonalize": on}) for on in (True, False)}
    gradients(named, 1)
    optimizers[False].step()
    kept = optimizers[False].state[named[0][1]]["exp_avg"].clone()
    optimizers[True].load_state_dict(optimizers[False].state_dict())
    optimizers[True].param_groups[0]["orthogonalize"] = True
    optimizers[True]._current_plan([p for _, p in named], [p.grad for _, p in named])
    state = optimizers[True].state[named[0][1]]
    assert torch.equal(state["exp_avg"], kept)
    assert "exp_avg_sq" not in state
    assert "exp_avg_sq" in optimizers[True].state[dict(named)["bias"]]
    optimizers[True].step()
    before = flat(named)
    with caplog.at_level(logging.WARNING):
        optimizers[False].load_state_dict(optimizers[True].state_dict())
        optimizers[False].param_groups[0]["orthogonalize"] = False
        gradients(named, 2)
        optimizers[False].step()
    assert "the state of 5 parameters has no second moment; their moments start again" in caplog.text
    assert (flat(named) - before).abs().max() <= 1e-2 * 1.01  # a first step of Adam: the rate, and decay


def test_vectors_stay_with_adamw() -> None:
    ours, plain = bag(), bag()
    for named, on in ((ours, True), (plain, False)):
        optimizer = CustomAdamW(named, **{**MUON, "orthogonalize": on})
        for step in range(3):
            gradients(named, step)
            optimizer.step()
    same = {name: torch.equal(a, dict(plain)[name]) for name, a in ours}
    assert {name for name, equal in same.items() if equal} == {"bias", "scalar"}


def test_what_it_excludes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    both = LoraRegression()
    with caplog.at_level(logging.WARNING):
        optimizer = CustomAdamW(both.named, **{**MUON, "use_adopt_stability": True, "use_grams": True})
    assert "ADOPT has nothing to divide by" in caplog.text
    assert "Grams' signs would undo" in caplog.text
    alone = LoraRegression()
    both.train(optimizer, 4)
    alone.train(CustomAdamW(alone.named, **MUON), 4)
    assert torch.equal(both.weights(), alone.weights())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_it_trains_whatever_the_size_of_the_loss(scale: float) -> None:
    problem = LoraRegression(width=20, rank=3)
    losses = problem.train(CustomAdamW(problem.named, **{**MUON, "lr": 2e-2}), 50, scale)
    assert losses[-1] < 0.5 * losses[0]
