"""Losses per element against closed forms and torch's own, and every registered one through the registry."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from library.config import registry
from library.diffusion.ddpm import DDPM
from library.losses import LOSSES
from library.losses.huber import SCHEDULES, pseudo_huber, smooth_l1, thresholds
from library.losses.l1 import l1
from library.losses.l2 import l2


def test_l2_and_l1_are_torchs_per_element():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(l2(a, b), torch.nn.functional.mse_loss(a, b, reduction="none"))
    torch.testing.assert_close(l1(a, b), torch.nn.functional.l1_loss(a, b, reduction="none"))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_zero_at_the_target_and_pulls_towards_it(name):
    loss = registry.load(LOSSES, name, where="test")
    more = [torch.tensor(0.1)] if len(inspect.signature(loss).parameters) == 3 else []
    target = torch.randn(2, 4, 3, 3)
    assert loss(target, target, *more).abs().max() < 1e-7
    prediction = (target + torch.randn_like(target)).requires_grad_()
    values = loss(prediction, target, *more)
    assert values.shape == target.shape
    assert (values > 0).all()
    values.sum().backward()
    assert (prediction.grad.sign() == (prediction - target).sign()).all()


def test_pseudo_huber_at_known_points():
    """2 c (sqrt(d² + c²) - c); with a 3-4-5 triangle the root is a whole number (arXiv 2403.16728, times two)."""
    d, zero = torch.tensor([3.0, 4.0, 0.0]), torch.zeros(3)
    c = torch.tensor([4.0, 3.0, 2.0])
    assert pseudo_huber(d, zero, c).tolist() == [2 * 4 * (5 - 4), 2 * 3 * (5 - 3), 0]
    assert smooth_l1(d, zero, c).tolist() == [2 * (5 - 4), 2 * (5 - 3), 0]


def test_huber_is_l2_for_small_errors_and_l1_for_large_ones():
    zero, c = torch.zeros((), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    small, large = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e4, dtype=torch.float64)
    assert pseudo_huber(small, zero, c).item() == pytest.approx(l2(small, zero).item(), rel=1e-5)
    assert pseudo_huber(large, zero, c).item() == pytest.approx(2 * 0.5 * l1(large, zero).item(), rel=1e-4)
    assert smooth_l1(small, zero, c).item() == pytest.approx(l2(small, zero).item() / 0.5, rel=1e-5)
    assert smooth_l1(large, zero, c).item() == pytest.approx(2 * l1(large, zero).item(), rel=1e-4)


def test_thresholds_at_known_timesteps():
    """Kohya's formulas (sd-scripts 0.10, train_util.py, get_huber_threshold_if_needed), worked out by hand."""
    table = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    levels = table / (1 - table), torch.arange(4) / 4
    assert thresholds("constant", *levels, c=0.1, scale=3.0).tolist() == pytest.approx([0.3] * 4)
    # exp(ln(0.0001) / 4 · t) = 0.1^t
    exponential = thresholds("exponential", *levels, c=0.0001, scale=2.0)
    assert exponential.tolist() == pytest.approx([2.0, 0.2, 0.02, 0.002])
    # sigma: 1/3, 1, 2, infinite
    snr = thresholds("snr", *levels, c=0.1, scale=2.0)
    assert snr.tolist() == pytest.approx([0.9 * 9 / 16 + 0.1, 0.9 / 4 + 0.1, 0.9 / 9 + 0.1, 0.1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thresholds_of_a_real_table_are_positive_and_never_rise(schedule):
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    process = DDPM("epsilon", torch.cumprod(1 - betas, 0))
    t = torch.arange(1000)
    found = thresholds(schedule, process.signal_to_noise(t), process.share(t), c=0.1, scale=1.0)
    assert found.shape == (1000,)
    assert found.min() > 0
    assert (found.diff() <= 0).all()
