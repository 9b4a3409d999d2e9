"""Elastic weight consolidation against its closed form."""

from __future__ import annotations

import torch
from torch import nn

from fine_tuning.consolidation import Consolidation


def test_the_closed_form() -> None:
    """For losses (x · w - y)² / 2 the Fisher information is the mean of ((x · w - y) x)²."""
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=draws), torch.randn(20, generator=draws)
    w, unused = nn.Parameter(torch.randn(5, generator=draws)), nn.Parameter(torch.ones(2))
    ewc = Consolidation([w, unused], strength=3.0)
    ewc.measure((one @ w - target).square() / 2 for one, target in zip(x, y, strict=True))
    fisher = ((x @ w - y)[:, None] * x).square().mean(0).detach()
    torch.testing.assert_close(ewc.fisher, [fisher, torch.zeros(2)])
    assert w.grad is None

    start = w.detach().clone()
    with torch.no_grad():
        w += torch.arange(5.0)
    penalty = 1.5 * (fisher * (w - start) ** 2).sum()
    (gradient,) = torch.autograd.grad(penalty, w)
    assert abs(ewc.penalty() - penalty.item()) < 1e-5 * penalty.item()
    w.grad = torch.ones(5)
    ewc.add_gradients()
    torch.testing.assert_close(w.grad, 1 + gradient)
    assert unused.grad is None


def test_training_ends_where_the_quadratic_says() -> None:
    """The new loss (w - 1)² / 2 with the penalty s F / 2 · (w - 0)² has its minimum at 1 / (1 + s F)."""
    w = nn.Parameter(torch.zeros(2))
    ewc = Consolidation([w], strength=4.0)
    ewc.measure([(torch.tensor([1.0, 0.0]) * w).sum()])  # F = 1, 0
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ((w - 1).square().sum() / 2).backward()
        ewc.add_gradients()
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.2, 1.0]))
