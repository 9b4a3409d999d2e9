"""Losses and weightings against closed forms, and every registered one through the registry."""

from __future__ import annotations

import pytest
import torch

from library.config import registry
from library.losses import LOSSES, WEIGHTINGS
from library.losses.l2 import l2
from library.losses.snr import min_snr_weight


def test_l2_is_torch_mse_per_element():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(l2(a, b), torch.nn.functional.mse_loss(a, b, reduction="none"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("snr", "epsilon", "velocity"),
    [
        # min(SNR, 5) / SNR and min(SNR, 5) / (SNR + 1), arXiv 2303.09556
        (0.25, 1.0, 0.2),
        (5.0, 1.0, 5 / 6),
        (20.0, 0.25, 5 / 21),
        (0.0, 1.0, 0.0),
    ],
)
def test_min_snr_weight(snr, epsilon, velocity):
    snr = torch.tensor([snr], dtype=torch.float64)
    assert min_snr_weight(snr, gamma=5.0, prediction_type="epsilon").item() == pytest.approx(epsilon, abs=1e-15)
    assert min_snr_weight(snr, gamma=5.0, prediction_type="v_prediction").item() == pytest.approx(velocity, abs=1e-15)


@pytest.mark.parametrize("table", [LOSSES, WEIGHTINGS])
def test_every_name_is_importable(table):
    for name in table:
        assert callable(registry.load(table, name, where="test"))
