"""Weight-decay curves at known steps, and what holds for all of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.optimizers.weight_decay import SCHEDULES, Curve, check, multi_stage

FALLING = ("exponential", "cosine", "sigmoid", "linear")


@pytest.mark.parametrize(
    ("step", "factor"), [(1, 1.0), (1000, 1.0), (1500, 0.8367), (2000, 0.7), (3000, 0.49), (99999, 0.49)]
)
def test_exponential_with_the_cap(step: int, factor: float) -> None:
    assert Curve().factor(step) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(1500, 0.84), (2000, 0.70), (3000, 0.49), (5000, 0.24), (7000, 0.118), (7456, 0.1), (9000, 0.1)],
)
def test_exponential_without_the_cap_is_the_table_of_milestones(step: int, factor: float) -> None:
    assert Curve(max_progress=math.inf).factor(step) == pytest.approx(factor, abs=5e-3)


def test_without_the_cap_the_floor_is_met_at_step_7456() -> None:
    curve = Curve(max_progress=math.inf)
    assert curve.factor(7455) > 0.1
    assert curve.factor(7456) == 0.1


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "linear"])
def test_curves_with_an_end(schedule: str) -> None:
    """From 1 at T to the least ratio at T (1 + max_progress), half of the way at the middle, and no further."""
    curve = Curve(schedule)
    assert curve.factor(1000) == 1.0
    assert curve.factor(2000) == pytest.approx(0.55)
    assert curve.factor(3000) == pytest.approx(0.1)
    assert curve.factor(30000) == pytest.approx(0.1)


def test_quarter_of_the_way() -> None:
    quarter = {schedule: Curve(schedule).factor(1500) for schedule in ("cosine", "sigmoid", "linear")}
    assert quarter["linear"] == pytest.approx(0.775)
    assert quarter["cosine"] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    low, at = 1 / (1 + math.exp(5)), 1 / (1 + math.exp(2.5))
    assert quarter["sigmoid"] == pytest.approx(1 - 0.9 * (at - low) / (1 - 2 * low))


STAGES = ((0, 1.0), (1000, 0.7), (3000, 0.4))


@pytest.mark.parametrize(
    ("step", "stepped", "joined"),
    [(1, 1.0, 0.9997), (500, 1.0, 0.85), (999, 1.0, 0.7003), (1000, 0.7, 0.7), (2000, 0.7, 0.55), (3000, 0.4, 0.4)],
)
def test_multi_stage(step: int, stepped: float, joined: float) -> None:
    assert multi_stage(step, stages=STAGES) == stepped
    assert multi_stage(step, stages=STAGES, interpolate=True) == pytest.approx(joined)
    assert multi_stage(9999, stages=STAGES) == multi_stage(9999, stages=STAGES, interpolate=True) == 0.4


def test_before_the_first_stage_the_weight_decay_is_as_given() -> None:
    assert [multi_stage(step, stages=((10, 0.5),)) for step in (9, 10)] == [1.0, 0.5]
    assert multi_stage(5, stages=((10, 0.5),), interpolate=True) == 0.75


def test_adaptive_is_the_exponential_from_the_flat_step_on() -> None:
    curve = Curve("adaptive")
    assert curve.factor(99999) == 1.0
    assert [curve.factor(step, flat_since=617) for step in (617, 1117, 1617, 9999)] == pytest.approx(
        [1.0, 0.8367, 0.7, 0.49], abs=5e-5
    )


numbers = st.builds(
    Curve,
    schedule=st.sampled_from([*FALLING, "adaptive"]),
    transition_steps=st.integers(1, 5000),
    decay_factor=st.floats(0.01, 1),
    min_ratio=st.floats(0, 1),
    max_progress=st.floats(0.01, 20),
)
ratios = st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 1)), min_size=1, unique_by=lambda pair: pair[0])


@settings(max_examples=200)
@given(curve=numbers, step=st.integers(1, 100_000), flat_since=st.integers(0, 5000))
def test_curves_hold_then_fall_and_never_rise(curve: Curve, step: int, flat_since: int) -> None:
    now, then = (curve.factor(s, flat_since=flat_since) for s in (step, step + 1))
    assert then <= now + 1e-12
    assert min(curve.min_ratio, now) - 1e-12 <= then <= now <= 1
    start = flat_since if curve.schedule == "adaptive" else curve.transition_steps
    if step <= start:
        assert now == 1.0


@settings(max_examples=200)
@given(curve=numbers, step=st.integers(1, 100_000), flat_since=st.integers(0, 5000))
def test_curves_are_continuous(curve: Curve, step: int, flat_since: int) -> None:
    """No jump is larger than the steepest place of the curve allows; where it holds and where it ends included."""
    now, then = (curve.factor(s, flat_since=flat_since) for s in (step, step + 1))
    span = curve.transition_steps * (1 if curve.schedule in ("exponential", "adaptive") else curve.max_progress)
    steepest = {"linear": 1.0, "cosine": math.pi / 2, "sigmoid": 2.6}.get(curve.schedule, -math.log(curve.decay_factor))
    assert now - then <= steepest / span + 1e-12


@settings(max_examples=100)
@given(curve=numbers.filter(lambda curve: curve.schedule != "adaptive"))
def test_curves_end_at_the_least_ratio_or_the_cap(curve: Curve) -> None:
    cap = curve.decay_factor**curve.max_progress if curve.schedule == "exponential" else 0.0
    assert curve.factor(10**9) == pytest.approx(max(curve.min_ratio, cap))


@settings(max_examples=100)
@given(stages=ratios, step=st.integers(1, 6000))
def test_interpolated_stages_are_continuous_and_between_their_neighbours(stages: Any, step: int) -> None:
    stages = sorted(stages)
    now, then = (multi_stage(s, stages=stages, interpolate=True) for s in (step, step + 1))
    points = [(0, 1.0), *stages]
    slopes = [abs(b - a) / (t - s) for (s, a), (t, b) in pairwise(points) if t > s]
    assert abs(then - now) <= max(slopes, default=0) + 1e-9
    assert min(ratio for _, ratio in points) - 1e-12 <= now <= 1
    assert multi_stage(step, stages=stages) in {ratio for _, ratio in points}


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (Curve("cosine", max_progress=math.inf), "wd_max_progress = inf; with wd_schedule 'cosine' it must be"),
        (Curve("linear", max_progress=0), "wd_max_progress = 0; with"),
        (Curve("multi_stage"), "'multi_stage' needs wd_stages, such as"),
        (Curve("multi_stage", stages=((10, 1.0), (10, 0.5))), "steps 10, 10; these must rise"),
        (Curve("multi_stage", stages=((-1, 1.0),)), "these must rise, from 0 or more"),
        (Curve("multi_stage", stages=((1, -1.0),)), "a ratio below 0"),
        (Curve("cosine", stages=STAGES), "wd_stages are for wd_schedule 'multi_stage', which is 'cosine'"),
    ],
)
def test_numbers_that_do_not_go_together(curve: Curve, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(curve, owner="x")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_usual_numbers_go_together(schedule: str) -> None:
    check(Curve(schedule, stages=STAGES if schedule == "multi_stage" else ()), owner="x")
