"""The order of the list, in every combination of the nine techniques."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adamw_problems import TECHNIQUES, LoraRegression, combinations, flat, full, gradients, label
from adamw_textbook import Textbook

from library.optimizers import CustomAdamW
from tests.quick import quick

ALL = combinations()


def test_there_are_384() -> None:
    assert len(ALL) == 2**9 - 2**7


@pytest.mark.parametrize("part", quick(range(8), 0, 3, 5, 6))
def test_every_combination_is_the_textbook_in_float64(part: int) -> None:
    for options in ALL[part::8]:
        options = {**options, "orthograd_target": "all", "wd_transition_steps": 3, "spd_lambda": 0.7, "lr": 0.05}
        named = LoraRegression(dtype=torch.float64, width=9, rank=3).named
        weights = [parameter.detach().clone() for _, parameter in named]
        books = [Textbook(options, role="down" if "down" in name else "up", scale=0.5) for name, _ in named]
        optimizer = CustomAdamW([{"params": named, "lora_scale": 0.5}], **options)
        for step in range(7):
            gradients(named, step)
            optimizer.step()
            downs = [weights[index - 1] if index % 2 else None for index in range(len(weights))]
            weights = [
                book.move(w, parameter.grad, down)
                for book, w, (_, parameter), down in zip(books, weights, named, downs, strict=True)
            ]
        expected = torch.cat([w.flatten() for w in weights])
        error = (flat(named) - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, f"{label(options)}: {error:.1e}"


@pytest.mark.parametrize("part", quick(range(8), 5))
@pytest.mark.parametrize("scale", quick([1.0, 1e2, 1e4], 1.0, 1e4))
def test_every_combination_trains(part: int, scale: float) -> None:
    """Fifty steps of a LoRA that starts at B = 0, loss times 1, 100, 10,000: finite, and the loss falls. 8 and 32 bits
    take turns."""
    for index, options in enumerate(ALL[part::8]):
        problem = LoraRegression(width=20, rank=3)
        bits: Any = 8 if (index + part) % 2 else 32
        optimizer = CustomAdamW(problem.named, lr=3e-3, optim_bits=bits, min_8bit_size=0, **options)
        losses = problem.train(optimizer, 50, scale)
        assert problem.weights().isfinite().all(), f"{label(options)}, {bits} bits"
        assert losses[-1] < losses[0], f"{label(options)}, {bits} bits: {losses[0]} → {losses[-1]}"


def test_adopt_knows_no_loss_scale() -> None:
    """With ADOPT alone the trajectory does not depend on the loss' unit, step 2 included (B = 0 at step 1)."""
    ends = []
    for scale in (1.0, 2.0**10, 2.0**20):
        problem = LoraRegression(dtype=torch.float64)
        options = {**dict.fromkeys(TECHNIQUES, False), "use_adopt_stability": True, "adopt_eps": 1e-20}
        problem.train(CustomAdamW(problem.named, lr=1e-2, **options), 30, scale)
        ends.append(problem.weights())
    assert torch.allclose(ends[1], ends[0], rtol=1e-9)
    assert torch.allclose(ends[2], ends[0], rtol=1e-9)


class TestADOPTsFirstCalls:
    def setup(self) -> tuple[LoraRegression, CustomAdamW]:
        problem = LoraRegression(width=70, rank=4)
        return problem, full(problem.named, lr=1e-2, optim_bits=32, weight_decay=0.5, use_orthogonal_grad=False)

    def test_the_first_call_moves_nothing(self) -> None:
        problem, optimizer = self.setup()
        before = problem.weights()
        problem.train(optimizer, 1)
        assert torch.equal(problem.weights(), before)
        down, up = problem.parameters[:2]
        assert not optimizer.state[down]["exp_avg_sq"].any()
        assert float(optimizer.state[down]["adopt_k"]) == 0
        assert optimizer.state[up]["exp_avg_sq"].any()
        assert float(optimizer.state[up]["adopt_k"]) == 1

    def test_lora_down_is_seeded_by_its_first_gradient_that_is_not_zero(self) -> None:
        problem, optimizer = self.setup()
        down, up = problem.parameters[:2]
        before = down.detach().clone()
        problem.train(optimizer, 2)
        assert up.detach().any()
        assert torch.equal(down, before)
        problem.train(optimizer, 1)  # the gradient at which lora_up has moved
        problem.train(optimizer, 1)
        assert float(optimizer.state[down]["adopt_k"]) == 2
        assert float((down.detach() - before).abs().max()) < 1e-2 * 1.1

    def test_a_step_uses_the_previous_second_moment_only(self) -> None:
        moved = []
        for last in (1.0, 5.0):
            parameter = torch.nn.Parameter(torch.zeros(3, 3))
            options = {**dict.fromkeys(TECHNIQUES, False), "use_adopt_stability": True, "adopt_clip": 9.0}
            optimizer = CustomAdamW([("x", parameter)], lr=1.0, weight_decay=0.0, betas=(0.0, 0.9), **options)
            for size in (2.0, last):
                parameter.grad = torch.full_like(parameter, size)
                optimizer.step()
            moved.append(float(parameter.detach()[0, 0]))
        assert moved == [pytest.approx(-0.5), pytest.approx(-1.0)]  # k = 1: |g^| <= 1


def test_grams_wins_over_cautious(caplog: pytest.LogCaptureFixture) -> None:
    both, grams = LoraRegression(), LoraRegression()
    optimizer = CustomAdamW(both.named, use_grams=True, use_cautious=True)
    assert sum("Grams" in record.message for record in caplog.records if record.levelname == "WARNING") == 1
    both.train(optimizer, 10)
    grams.train(CustomAdamW(grams.named, use_grams=True, use_cautious=False), 10)
    assert torch.equal(both.weights(), grams.weights())


def test_orthograd_projects_lora_down_only_by_default() -> None:
    off, on = LoraRegression(dtype=torch.float64), LoraRegression(dtype=torch.float64)
    for problem in (off, on):  # away from B = 0
        for parameter in problem.parameters:
            parameter.data += 0.1
    nothing = dict.fromkeys(TECHNIQUES, False)
    off.train(CustomAdamW(off.named, **nothing), 1)
    on.train(CustomAdamW(on.named, **{**nothing, "use_orthogonal_grad": True}), 1)
    same = [torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(off.parameters, on.parameters, strict=True)]
    assert same == [False, True, False, True]


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_gradient_that_is_no_number_is_not_hidden(implementation: Any, bits: Any) -> None:
    problem = LoraRegression()
    optimizer = CustomAdamW(
        problem.named, optim_bits=bits, min_8bit_size=0, implementation=implementation, use_agr=False, use_tam=False
    )
    problem.train(optimizer, 3)
    problem.backward()
    problem.parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert problem.parameters[0][0, 0].isnan()
