"""Signs that training goes wrong; each rule is a pure function of series of numbers.

A diffusion model's loss and gradient depend more on the noise level drawn than on learning, so no rule looks at single
values: medians and means of many steps are compared, with thresholds that noise does not reach.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from library.optimizers.weight_decay import VANISHED
from library.training.capacity import Epochs, is_full

Series = Sequence[tuple[float, float]]  # (step, value)
ByTimestep = Sequence[float | None]  # a mean loss for each range of noise levels, None where there was no sample

SIDE = 200  # steps that are compared, before and after the weight decay begins to fall
GROUP = 10  # steps that one mean is over
USUAL, RECENT = 50, 10  # gradient norms that are compared
MEASUREMENTS = 10  # of the update that must agree
STRETCH = 10  # steps, at least, that losses by noise level are means over
FIRST, LAST = 3, 5  # of these stretches that are compared
RANGES = 3  # of the noise levels, at least, that must be known on both sides
WORSE = 3  # validations in a row
STILL = 3  # measurements in a row, over 10 steps at least, in which next to no weight changes
MOVING = 1e-3  # share of a group's weights that changes with each step, at least; 0.33 in bf16, 1 in fp32 are usual


class Sign(NamedTuple):
    """`name` for programs; `text` for users: the observation, its usual cause, the remedy."""

    name: str
    text: str


OSCILLATION = Sign(
    "oscillation",
    "the loss swings more than before the weight decay began to fall. It may fall too steeply: --wd_decay_factor 0.75 "
    "to 0.8, or begin 200 to 500 steps later: --wd_transition_steps",
)
EXPLODING_GRADIENTS = Sign(
    "exploding gradients",
    "the gradients are ten times as large as they were. The learning rate is probably too high: lower it first. With a "
    "weight decay that falls, also keep more of it (--wd_min_ratio 0.15 to 0.2) and begin 200 to 500 steps later "
    "(--wd_transition_steps)",
)
FLAT_UPDATES = Sign(
    "flat updates",
    "each step changes almost nothing: to the end of the run the weights would move by less than 5 %. The learning "
    "rate is probably too low: try ten times as much. With a weight decay that falls, let it fall faster: "
    "--wd_decay_factor 0.6 to 0.65",
)
STANDSTILL = Sign(
    "weights stand still",
    "the steps change no weight of {}, or fewer than one in 1,000, though the learning rate is not 0: nothing is "
    "learnt there. The updates are too small for the precision of the weights: leave --full_fp16 or --full_bf16 out, "
    "so that they are kept in fp32, or raise the learning rate; or there is no gradient",
)
COLLAPSE = Sign(
    "collapse",
    "the loss has risen to several times its first values at all noise levels: the model is losing its abilities. "
    "The learning rate is probably too high: begin again with a tenth of it, or find one with --find_lr",
)
OVERFITTING = Sign(
    "overfitting",
    "the validation loss rises while the training loss falls: the images are being learnt by heart. Use the file from "
    "where the validation loss was lowest; next time train fewer steps, with a lower --network_dim or with "
    "--network_dropout 0.1. With a weight decay that falls, keep more of it (--wd_min_ratio 0.15 to 0.2)",
)
CAPACITY = Sign(
    "capacity",
    "in four epochs the training loss has fallen by less than 2 % an epoch, and the validation loss by less than 2 % "
    "in all, without overfitting: the network may have learnt all that it can hold. If samples are good, stop here; if "
    "not, first look at images and captions (--check_data), then double --network_dim, or adapt more layers "
    "(--network_args conv_dim=8, preset=full)",
)
WEIGHT_DECAY_GONE = Sign(
    "weight decay gone",
    "the weight decay has fallen below 1e-8: nothing is regularised any more. --wd_min_ratio keeps a share of it",
)


# -- the rules


def swing(losses: Sequence[float]) -> float:
    """The swing of the loss: the standard deviation of its means over `GROUP` steps around their straight line.

    Needs at least three such means. For white noise of deviation s it is s / sqrt(GROUP).
    """
    means = [math.fsum(losses[i : i + GROUP]) / GROUP for i in range(0, len(losses) - GROUP + 1, GROUP)]
    n = len(means)
    middle, mean = (n - 1) / 2, math.fsum(means) / n
    slope = math.fsum((i - middle) * (value - mean) for i, value in enumerate(means)) / (n * (n * n - 1) / 12)
    left = math.fsum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(means))
    return math.sqrt(left / (n - 2))


def oscillates(before: Sequence[float], after: Sequence[float], *, ratio: float = 3.0) -> bool:
    """Whether the loss swings `ratio` times as far after the weight decay began to fall as before.

    `before` and `after`: `SIDE` losses each, one a step; with fewer the answer is False. Normal noise is a false alarm
    once in 10⁵ times.
    """
    if len(before) < SIDE or len(after) < SIDE:
        return False
    return swing(after) > ratio * swing(before)


def explodes(norms: Sequence[float], *, ratio: float = 10.0) -> bool:
    """Whether the gradient grows out of proportion: the median of the last `RECENT` norms is more than `ratio` times
    that of the first `USUAL`. `norms`: before clipping, one a step; NaN counts as infinite."""
    if len(norms) < USUAL + RECENT:
        return False
    norms = [math.inf if math.isnan(norm) else norm for norm in norms]
    return statistics.median(norms[-RECENT:]) > ratio * statistics.median(norms[:USUAL])


def is_flat(ratios: Sequence[float], rates: Sequence[float], *, peak: float, steps: int, least: float = 0.05) -> bool:
    """Whether the steps are too small to train: `steps` of them, all in one direction and each as large as the median
    of the last ones, would move the weights by less than `least` of themselves.

    `ratios`: |change| / |weights|, one a measurement; `rates`: the learning rate at each; `peak`: the highest so far.
    While the rate rises, or is below half its peak, small steps are expected.
    """
    ratios, rates = ratios[-MEASUREMENTS:], rates[-MEASUREMENTS:]
    if len(ratios) < MEASUREMENTS or rates[-1] > rates[0] or rates[-1] < peak / 2:
        return False
    return statistics.median(ratios) * steps < least


def stands_still(steps: Sequence[int], shares: Sequence[float], rates: Sequence[float], *, peak: float) -> bool:
    """Whether next to no weight of a group has changed in the last `STILL` steps that were measured.

    `shares`: of the weights that each step changed; `rates`: the group's learning rate in each; `peak`: the highest so
    far. If the rate is below half its peak, standing still is expected. Ten steps must lie between the measurements,
    because some optimizers do nothing in their first steps.
    """
    steps, shares, rates = steps[-STILL:], shares[-STILL:], rates[-STILL:]
    if len(steps) < STILL or steps[-1] - steps[0] < 10:
        return False
    return max(shares) < MOVING and min(rates) > 0 and min(rates) >= peak / 2


def collapses(first: Sequence[ByTimestep], last: Sequence[ByTimestep], *, ratio: float = 5.0) -> bool:
    """Whether the loss is far above its first values: the geometric mean, over the ranges of noise levels, of the
    median of `last` over the lowest of `first` is more than `ratio`. `first`, `last`: one a stretch of the run.

    Range by range, because a network whose predictions are useless has a loss of about 1 everywhere: that is three
    times the usual at low timesteps, and a hundred times at high ones.
    """
    rises = []
    for early, late in zip(zip(*first, strict=True), zip(*last, strict=True), strict=True):
        before, now = ([loss for loss in losses if loss is not None and loss > 0] for losses in (early, late))
        if before and now:
            rises.append(math.log(statistics.median(now) / min(before)))
    return len(rises) >= RANGES and statistics.fmean(rises) > math.log(ratio)


def overfits(training: Series, validation: Series, *, worse: float = 0.02) -> bool:
    """Whether the validation loss rises while the training loss falls.

    The last `WORSE` validations lie above the best one before them by more than `worse` of it, none is better than the
    one before it, and the mean of the training loss since that best one is lower than until it.
    """
    earlier, last = validation[:-WORSE], [loss for _, loss in validation[-WORSE:]]
    if not earlier:
        return False
    best_step, best = min(earlier, key=lambda item: item[1])
    if min(last) <= best * (1 + worse) or last != sorted(last):
        return False
    until = [loss for step, loss in training if step <= best_step]
    since = [loss for step, loss in training if step > best_step]
    return bool(until and since) and statistics.fmean(since) < statistics.fmean(until)


# -- over a run


class _Moved:
    """The last measurements of a group of parameters."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float, float]] = deque(maxlen=STILL)
        self._peak = 0.0

    def add(self, step: int, share: float, rate: float) -> None:
        self._last.append((step, share, rate))
        self._peak = max(self._peak, rate)

    def stands_still(self) -> bool:
        steps, shares, rates = zip(*self._last, strict=True)
        return stands_still(steps, shares, rates, peak=self._peak)


class Watch:
    """Keeps the numbers that the rules need, in constant memory, and reports each sign once."""

    def __init__(self, *, total_steps: int) -> None:
        self.found: set[str] = set()
        self._total_steps = total_steps
        self._losses: deque[float] = deque(maxlen=SIDE)
        self._before: list[float] = []  # the losses until the weight decay began to fall
        self._decays: tuple[float, float] | None = None  # the first and the last
        self._falling = 0  # steps since
        self._norms: deque[float] = deque(maxlen=2 * SIDE)
        self._ratios: deque[float] = deque(maxlen=MEASUREMENTS)
        self._rates: deque[float] = deque(maxlen=MEASUREMENTS)
        self._peak = 0.0
        self._moved: dict[str, _Moved] = {}
        self._stretch: list[ByTimestep] = []  # the current one
        self._stretch_began = 0
        self._first: list[ByTimestep] = []
        self._last: deque[ByTimestep] = deque(maxlen=LAST)
        self._validation: deque[tuple[float, float]] = deque(maxlen=200)
        self._epochs = Epochs()

    def step(self, *, loss: float, gradient_norm: float | None, weight_decay: float | None) -> list[Sign]:
        """Add the numbers of a step. Returns the new signs. `weight_decay`: the largest of the groups'.

        A loss of NaN is that of a skipped step.
        """
        self._fall(weight_decay)
        if math.isfinite(loss):
            self._losses.append(loss)
        if gradient_norm is not None:
            self._norms.append(gradient_norm)
        full = self._falling > 0 and self._falling % SIDE == 0
        return self._new(
            (OSCILLATION, full and oscillates(self._before, list(self._losses))),
            (EXPLODING_GRADIENTS, explodes(list(self._norms))),
            (WEIGHT_DECAY_GONE, self._decays is not None and 0 <= self._decays[1] < VANISHED <= self._decays[0]),
        )

    def trained(self, step: int, *, epoch: int, loss: float) -> None:
        """Add the loss of a step of an epoch, for the rule about the network's capacity."""
        self._epochs.add(step, epoch=epoch, loss=loss)

    def measured(
        self,
        step: int,
        *,
        update_ratio: float,
        rates: Mapping[str, float],
        moved: Mapping[str, float],
        loss_by_timestep: ByTimestep,
    ) -> list[Sign]:
        """Add a measurement: the size of a step's update, its learning rates and shares of changed weights by group of
        parameters, and the losses since the last measurement. Returns the new signs."""
        rate = max(rates.values(), default=0.0)
        self._ratios.append(update_ratio)
        self._rates.append(rate)
        self._peak = max(self._peak, rate)
        flat = is_flat(list(self._ratios), list(self._rates), peak=self._peak, steps=self._total_steps)
        self._lengthen(step, loss_by_timestep)
        collapsed = len(self._last) == LAST and collapses(self._first, list(self._last))
        still = self._still(step, rates, moved)
        found = self._new(
            (Sign(STANDSTILL.name, STANDSTILL.text.format(" and ".join(still))), bool(still)), (COLLAPSE, collapsed)
        )
        # the advice of this sign is for weights that move
        return found + self._new((FLAT_UPDATES, flat and STANDSTILL.name not in self.found))

    def _still(self, step: int, rates: Mapping[str, float], moved: Mapping[str, float]) -> list[str]:
        """The groups that stand still."""
        for name, share in moved.items():
            self._moved.setdefault(name, _Moved()).add(step, share, rates.get(name, 0.0))
        return [name for name, group in self._moved.items() if group.stands_still()]

    def validated(self, step: int, loss: float, training: Series) -> list[Sign]:
        """Add a validation loss, and the training losses so far. Returns the new signs."""
        self._validation.append((step, loss))
        found = self._new((OVERFITTING, overfits(training, list(self._validation))))
        falls = bool(self._rates) and self._rates[-1] < self._peak / 2  # of the rate: standing still is expected then
        full = not falls and OVERFITTING.name not in self.found and is_full(self._epochs.whole(), self._validation)
        return found + self._new((CAPACITY, full))

    def _lengthen(self, step: int, loss_by_timestep: ByTimestep) -> None:
        """Add losses to the current stretch; if it is long enough, keep its means and begin another."""
        self._stretch.append(loss_by_timestep)
        if step - self._stretch_began < STRETCH:
            return
        known = ([loss for loss in losses if loss is not None] for losses in zip(*self._stretch, strict=True))
        means = [statistics.fmean(losses) if losses else None for losses in known]
        if len(self._first) < FIRST:
            self._first.append(means)
        else:
            self._last.append(means)
        self._stretch, self._stretch_began = [], step

    def _fall(self, weight_decay: float | None) -> None:
        """Count the steps since the weight decay first fell below its first value."""
        if weight_decay is None:
            return
        first = weight_decay if self._decays is None else self._decays[0]
        self._decays = (first, weight_decay)
        if weight_decay < first and not self._falling:
            self._before = list(self._losses)
        if weight_decay < first or self._falling:
            self._falling += 1

    def _new(self, *verdicts: tuple[Sign, bool]) -> list[Sign]:
        signs = [sign for sign, seen in verdicts if seen and sign.name not in self.found]
        self.found |= {sign.name for sign in signs}
        return signs
