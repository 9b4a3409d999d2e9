"""What follows from a series of validation losses."""

from __future__ import annotations

import math

import pytest

from library.record.validation_history import History, Validation
from library.training.hooks.validation import Times


def history(*losses: float, patience: int | None = None, threshold: float = 0.0) -> History:
    """Validations before training and after every ten steps."""
    found = [Validation(10 * number, loss, {500: loss}) for number, loss in enumerate(losses)]
    return History(patience=patience, threshold=threshold, validations=found)


def test_the_best_is_the_earliest_lowest_after_a_step() -> None:
    assert history(1.0).best is None
    best = history(0.1, 0.9, 0.5, math.nan, 0.5, 0.7).best
    assert best is not None
    assert (best.step, best.loss) == (20, 0.5)


@pytest.mark.parametrize(
    ("losses", "threshold", "count"),
    [
        ((), 0.0, 0),
        ((1.0,), 0.0, 0),  # before training
        ((0.1, 1.0), 0.0, 0),  # the first is an improvement on none
        ((1.0, 0.9, 0.8, 0.8, 0.81), 0.0, 2),
        ((1.0, 0.9, 0.8, math.nan, math.nan), 0.0, 2),
        ((1.0, math.nan, 0.9, 0.8), 0.0, 0),
        ((1.0, 0.900, 0.899, 0.898), 0.01, 2),  # less than a percent
        ((1.0, 0.900, 0.895, 0.890), 0.01, 0),  # slowly, but more than a percent of what last counted
        ((1.0, 0.9, 0.5, 0.6, 0.49), 0.05, 2),
    ],
)
def test_validations_without_improvement(losses: tuple[float, ...], threshold: float, count: int) -> None:
    assert history(*losses, threshold=threshold).without_improvement == count
    assert history(*losses, threshold=threshold, patience=2).patience_is_over == (count >= 2)
    assert not history(*losses, threshold=threshold).patience_is_over


def test_its_state_is_all_of_it() -> None:
    before, after = history(1.0, 0.9, 0.95), history()
    after.load_state_dict(before.state_dict())
    assert after.validations == before.validations
    assert (after.loss_after(20), after.loss_after(10), history().loss_after(0)) == (0.95, None, None)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (
            (1.0, 0.9),
            "validation was lowest at the end: 0.9000 (1.0000 before training); training longer may still help",
        ),
        (
            (1.0, 0.9, 0.8, 0.85, 0.824),
            "validation was lowest at step 20 (0.8000) (1.0000 before training); the last 20 steps made it 3.0% worse: "
            "fox-best.safetensors is the one to use",
        ),
        (
            (1.0, 0.8, 0.8),
            "validation was lowest at step 10 (0.8000) (1.0000 before training); the last 10 steps did not improve it: "
            "fox-best.safetensors is the one to use",
        ),
        (
            (0.5, 0.6, 0.7),
            "validation never fell below that of the base model (0.5000 before training, at best 0.6000, at step 10): "
            "the network does not generalise to the images held out. Lower the learning rate, or check the "
            "captions",
        ),
        ((1.0,), None),
        ((1.0, math.nan), None),
    ],
)
def test_the_conclusion(losses: tuple[float, ...], sentence: str | None) -> None:
    assert history(*losses).conclusion(best_file="fox-best.safetensors") == sentence


def test_a_last_one_that_is_lowest_by_nothing_worth_it() -> None:
    said = history(1.0, 0.8, 0.9).conclusion(best_file="")
    assert said is not None
    assert said.endswith("made it 12.5% worse: there is no file of the best")
    said = history(1.0, 0.9, 0.899, threshold=0.01).conclusion(best_file="fox-best.safetensors")
    assert said == "validation was lowest at the end: 0.8990 (1.0000 before training); it had stopped improving"


@pytest.mark.parametrize(
    ("steps", "epochs", "due"),
    [
        (None, None, {0: ("epoch",), 4: ("epoch",), 8: ("epoch",), 10: ("epoch",)}),
        (3, None, {0: ("step",), 3: ("step",), 6: ("step",), 9: ("step",), 10: ("step",)}),
        (None, 2, {0: ("epoch",), 8: ("epoch",), 10: ("epoch",)}),
        (4, 1, dict.fromkeys((0, 4, 8, 10), ("step", "epoch"))),
    ],
)
def test_when(steps: int | None, epochs: int | None, due: dict[int, tuple[str, ...]]) -> None:
    """Epochs of four steps, ten steps in all."""
    times = Times(every_n_steps=steps, every_n_epochs=epochs, steps_per_epoch=4, total_steps=10)
    assert {step: times.due(step) for step in range(11) if times.due(step)} == due
