"""The rules about warning signs: each on series that show the sign and on series that do not."""

from __future__ import annotations

import math
import random

import pytest

from library.training import warning_signs as signs
from library.training.warning_signs import Watch, collapses, explodes, is_flat, oscillates, overfits, stands_still

MOVING = {"update_ratio": 2e-3, "rates": {"unet": 1e-4}, "moved": {"unet": 1.0}}  # a healthy measurement


def diffusion_losses(count: int, *, seed: int = 0, level: float = 0.12) -> list[float]:
    """As they come with batch size 1: skewed noise as large as the loss itself, from the timestep drawn."""
    draw = random.Random(seed)
    return [level * draw.lognormvariate(-0.32, 0.8) for _ in range(count)]


def gradient_norms(count: int, *, seed: int = 0) -> list[float]:
    """Rising at first, while lora_up leaves 0, with noise and single spikes."""
    draw = random.Random(seed)
    spikes = [30 if draw.random() < 0.02 else 1 for _ in range(count)]
    return [(0.2 + 0.3 * min(1, i / 100)) * draw.lognormvariate(0, 0.6) * spikes[i] for i in range(count)]


# -- oscillation


def test_a_loss_that_swings_after_the_transition():
    before, noise = diffusion_losses(200, seed=1), diffusion_losses(200, seed=2)
    swinging = [loss + 0.15 * math.sin(step / 8) for step, loss in enumerate(noise)]
    assert oscillates(before, swinging)
    assert not oscillates(before, noise)
    assert not oscillates(swinging, noise)
    assert not oscillates(swinging, swinging)  # it did so before, too


def test_a_loss_that_falls_or_rises_in_a_line_does_not_swing():
    before, noise = diffusion_losses(200, seed=1), diffusion_losses(200, seed=2)
    assert not oscillates(before, [loss + 0.005 * step for step, loss in enumerate(noise)])


def test_too_few_losses_say_nothing():
    assert not oscillates([0.1] * 199, [0.0, 9.0] * 100)
    assert not oscillates([0.1, 0.2] * 100, [0.0] * 10 + [9.0] * 10)


# -- gradients


@pytest.mark.parametrize(
    "after",
    [
        [0.5 * 1.3**step for step in range(60)],
        [20.0] * 12,
        [math.inf] * 12,
        [math.nan] * 12,
    ],
    ids=["grows", "jumps", "infinite", "not a number"],
)
def test_gradients_that_explode(after):
    assert explodes(gradient_norms(100) + after)


def test_gradients_that_do_not():
    assert not explodes(gradient_norms(400))
    assert not explodes([0.5] * 100 + [500.0, 800.0, math.inf] + [0.5] * 8)  # a few steps only
    assert not explodes([0.0] * 5 + [0.1 * 1.02**step for step in range(100)])  # sevenfold in 100 steps
    assert not explodes([1e-9] * 20 + [1.0] * 30)  # too early to say
    assert not explodes([math.inf] * 12 + [0.5] * 100)  # fp16 finds its loss scale


# -- updates


def test_updates_that_get_nowhere():
    assert is_flat([1e-6] * 10, [1e-6] * 10, peak=1e-6, steps=1000)
    assert not is_flat([2e-3] * 10, [1e-4] * 10, peak=1e-4, steps=1000)
    assert not is_flat([1e-6] * 9, [1e-6] * 9, peak=1e-6, steps=1000)  # too early to say
    assert not is_flat([1e-6] * 10, [1e-7 * i for i in range(10)], peak=1e-6, steps=1000)  # warm-up
    assert not is_flat([1e-6] * 10, [1e-6] * 10, peak=1e-4, steps=1000)  # the end of a cosine
    assert is_flat([5e-3, 1.0] + [1e-6] * 10, [1e-4] * 12, peak=1e-4, steps=1000)  # they were larger once


# -- weights that stand still


def test_weights_that_stand_still():
    assert stands_still([1, 10, 20], [0.0, 0.0, 0.0], [1.0] * 3, peak=1.0)
    assert stands_still([10, 20, 30], [9e-4, 0.0, 2e-4], [1e-4] * 3, peak=1e-4)
    assert stands_still([1, 10, 20, 30], [1.0, 0.0, 0.0, 0.0], [1.0] * 4, peak=1.0)  # they moved once


@pytest.mark.parametrize(
    ("steps", "shares", "rates", "peak"),
    [
        ([10, 20], [0.0] * 2, [1.0] * 2, 1.0),  # too early to say
        ([1, 2, 3], [0.0] * 3, [1.0] * 3, 1.0),  # the silent first steps of RAdamScheduleFree
        ([10, 20, 30], [0.0, 0.0, 0.33], [1.0] * 3, 1.0),  # bf16
        ([1, 10, 20], [0.0] * 3, [0.0, 0.5, 1.0], 1.0),  # a warm-up's first step has no rate
        ([10, 20, 30], [0.0] * 3, [0.0] * 3, 0.0),  # a part that is not to be trained
        ([80, 90, 100], [0.0] * 3, [0.6, 0.5, 0.4], 1.0),  # the end of a cosine, in bf16
    ],
)
def test_weights_that_do_not(steps, shares, rates, peak):
    assert not stands_still(steps, shares, rates, peak=peak)


def test_a_part_that_stands_still_is_named_once_and_not_called_flat():
    watch, rates = Watch(total_steps=1000), {"unet": 1.0, "text_encoder": 0.0, "text_encoder_2": 1.0}
    moved = {"unet": 0.0, "text_encoder": 0.0, "text_encoder_2": 0.9}
    steps = [1, *range(10, 210, 10)]
    measured = {"update_ratio": 1e-9, "rates": rates, "moved": moved, "loss_by_timestep": [0.1] * 5}
    found = [(step, sign) for step in steps for sign in watch.measured(step, **measured)]
    assert [(step, sign.name) for step, sign in found] == [(20, "weights stand still")]
    assert "no weight of unet, or fewer" in found[0][1].text


# -- overfitting

FALLING = [(float(step), 0.2 - 0.0001 * step) for step in range(1, 1001)]


def validations(*losses: float) -> list[tuple[float, float]]:
    return [(100.0 * (i + 1), loss) for i, loss in enumerate(losses)]


def test_validation_that_rises_while_training_falls():
    assert overfits(FALLING, validations(0.20, 0.18, 0.17, 0.175, 0.178, 0.181))


@pytest.mark.parametrize(
    "losses",
    [
        (0.20, 0.18, 0.17, 0.165),
        (0.17, 0.18, 0.19),  # only three
        (0.20, 0.17, 0.1705, 0.1708, 0.171),  # by less than 2 %
        (0.20, 0.17, 0.18, 0.175, 0.19),  # up and down
        (0.20, 0.17, 0.19, 0.185, 0.18),  # it comes back
    ],
)
def test_validation_that_does_not(losses):
    assert not overfits(FALLING, validations(*losses))


def test_where_the_training_loss_rises_as_well_it_is_something_else():
    rising = [(step, 0.3 - loss) for step, loss in FALLING]
    assert not overfits(rising, validations(0.20, 0.18, 0.17, 0.175, 0.178, 0.181))


# -- a network that forgets


USUAL = [0.25, 0.12, 0.07, 0.03, 0.008]  # from the lowest timesteps to the highest


def test_a_loss_that_rises_whatever_the_timestep():
    assert collapses([USUAL] * 3, [[1.0] * 5] * 5)
    assert collapses([USUAL, [None] * 5, [1.0] * 5], [[1.0, None, 1.0, None, 1.0]] * 5)  # the lowest counts
    assert not collapses([USUAL] * 3, [USUAL] * 5)
    assert not collapses([USUAL] * 3, [[1.0, 0.5, 0.07, 0.03, 0.008]] * 5)  # not everywhere
    assert not collapses([USUAL] * 3, [USUAL] * 3 + [[1.0] * 5] * 2)  # for a while
    assert not collapses([[0.25, 0.12, None, None, None]] * 3, [[9.0] * 5] * 5)  # too little is known of before


@pytest.mark.parametrize("every", [1, 10])
def test_it_is_said_once_and_soon_however_often_is_measured(every):
    draw = random.Random(every)
    for broken in (False, True):
        watch, seen, samples = Watch(total_steps=10**9), [], [[] for _ in USUAL]
        for step in range(1, 1201):  # one image a step
            place, noise = draw.randrange(5), draw.lognormvariate(-0.32, 0.8)
            samples[place].append(noise if broken and step > 12 else USUAL[place] * noise)
            if step % every == 0 or step == 1:
                means = [sum(losses) / len(losses) if losses else None for losses in samples]
                found = watch.measured(step, **MOVING, loss_by_timestep=means)
                seen += [(step, sign) for sign in found]
                samples = [[] for _ in USUAL]
        assert [sign for _, sign in seen] == [signs.COLLAPSE] * broken
        assert all(step <= 100 for step, _ in seen)


# -- over a run


def watched(watch: Watch, losses: list[float], norms: list[float], decays: list[float]) -> list[tuple[int, str]]:
    found = []
    for step, (loss, norm, decay) in enumerate(zip(losses, norms, decays, strict=True), 1):
        new = watch.step(loss=loss, gradient_norm=norm, weight_decay=decay)
        found += [(step, sign.name) for sign in new]
        if step % 10 == 0:
            assert watch.measured(step, **MOVING, loss_by_timestep=[0.1] * 5) == []
    return found


def falling_decay(count: int, *, start: int = 300, least: float = 0.1) -> list[float]:
    return [0.01 * max(least, 0.7 ** max(0.0, (step - start) / 300)) for step in range(1, count + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_raise_no_alarm(seed):
    """2000 steps each, so 40,000 together."""
    losses = [loss * (0.6 + 0.4 * 0.998**i) for i, loss in enumerate(diffusion_losses(2000, seed=seed))]
    assert watched(Watch(total_steps=2000), losses, gradient_norms(2000, seed=seed), falling_decay(2000)) == []


def test_each_sign_is_said_once_and_soon():
    losses = diffusion_losses(1200)
    losses[400:] = [loss + 0.2 * math.sin(i / 8) for i, loss in enumerate(losses[400:])]
    norms = gradient_norms(1000) + [50.0] * 200
    found = watched(Watch(total_steps=1200), losses, norms, falling_decay(1200, start=400, least=0.0))
    assert found[0] == (600, "oscillation")
    assert [name for _, name in found] == ["oscillation", "exploding gradients"]
    assert 1000 < found[1][0] <= 1010


def test_a_weight_decay_that_vanishes():
    decays = [0.01] * 10 + [0.01 * 0.5**i for i in range(40)]
    assert watched(Watch(total_steps=50), diffusion_losses(50), gradient_norms(50), decays) == [
        (31, "weight decay gone")
    ]
    assert watched(Watch(total_steps=50), diffusion_losses(50), gradient_norms(50), [0.0] * 50) == []


def test_flat_updates_and_overfitting_are_said_once():
    watch = Watch(total_steps=1000)
    small = {"update_ratio": 1e-7, "rates": {"unet": 1e-6}, "moved": {"unet": 1.0}, "loss_by_timestep": [0.1] * 5}
    found = [watch.measured(10 * i, **small) for i in range(30)]
    assert [sign for new in found for sign in new] == [signs.FLAT_UPDATES]
    assert found[9] == [signs.FLAT_UPDATES]
    found = [watch.validated(*item, FALLING) for item in validations(0.2, 0.17, 0.18, 0.19, 0.2, 0.21)]
    assert [sign for new in found for sign in new] == [signs.OVERFITTING]
