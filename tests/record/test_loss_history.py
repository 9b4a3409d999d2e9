"""The curve of the loss in constant memory."""

from __future__ import annotations

import math
import random

import pytest
import torch

from library.record.loss_history import MOST, RECENT, LossHistory


def filled(losses: list[float]) -> LossHistory:
    history = LossHistory()
    for loss in losses:
        history.add(loss)
    return history


def test_every_loss_is_there_while_there_is_room():
    history = filled([3.0, 1.0, 2.0])
    assert history.curve() == [(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)]
    assert history.average == 2.0
    assert filled([float(i) for i in range(1, 301)]).average == sum(range(201, 301)) / RECENT


def test_a_long_run_keeps_means_over_longer_stretches():
    losses = [random.Random(step).random() for step in range(5 * MOST)]
    history = filled(losses)
    assert history.stretch == 8  # 4 points would be left over at 4
    assert MOST // 2 <= len(history.points) < MOST
    for i in (0, 1, 1000, len(history.points) - 1):
        step, mean = history.curve()[i]
        assert step == 8 * i + 4.5
        assert mean == pytest.approx(sum(losses[8 * i : 8 * i + 8]) / 8)


@pytest.mark.parametrize("count", [0, 5, MOST + 3, 3 * MOST + 1])
def test_a_state_goes_on_where_it_was(count):
    losses = [random.Random(step).random() for step in range(count + 200)]
    whole, resumed = filled(losses), LossHistory()
    resumed.load_state_dict(filled(losses[:count]).state_dict())
    for loss in losses[count:]:
        resumed.add(loss)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert {key: value for key, value in ours.items() if not torch.is_tensor(value)} == {
        key: value for key, value in theirs.items() if not torch.is_tensor(value)
    }
    assert all(torch.equal(ours[key], theirs[key]) for key in ("losses", "recent_losses", "begun_losses"))


def test_steps_that_were_skipped_count_in_no_mean():
    history = filled([1.0, math.nan, 3.0] + [2.0] * (MOST - 3))
    assert history.average == 2.0
    assert history.points[:2] == [1.0, 2.5]
    assert math.isnan(filled([math.nan]).average)


def test_states_from_when_every_loss_was_kept_are_read():
    history = LossHistory()
    history.load_state_dict({"losses": torch.arange(150, dtype=torch.float64)})
    assert len(history.points) == 150
    assert list(history.recent) == list(range(50, 150))
