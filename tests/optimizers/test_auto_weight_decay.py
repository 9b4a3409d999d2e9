"""The tables and rules behind "auto"."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from library.config.options.weight_decay import WeightDecayOptions
from library.optimizers import auto_weight_decay as auto


@pytest.mark.parametrize(
    ("total", "task", "steps"),
    [
        (10_000, "text_generation", 1500),
        (10_000, "image_classification", 2000),
        (10_000, "image_generation", 1200),
        (10_000, "multimodal", 1800),
        (10_000, "general", 1600),
        (10_000, None, 1600),
        (10_000, "text_to_image", 1800),  # by its domain
        (10_000, "object_detection", 1600),  # neither it nor its domain has a number
        (3_000, "image_generation", 500),  # 360: never below 500
        (20_000, "general", 2000),  # 3200: never above 2000
        (2_999, "image_classification", 749),
        (1_000, None, 500),
        (200, None, 500),
        (20_001, None, 2000),
        (100_000, "text_generation", 10_000),
    ],
)
def test_transition_steps(total: int, task: str | None, steps: int) -> None:
    found, _ = auto.transition_steps(total, task)
    assert found == steps
    assert isinstance(found, int)


FACTORS = {
    "image_classification": 0.65,
    "object_detection": 0.70,
    "image_generation": 0.60,
    "image_segmentation": 0.68,
    "text_generation": 0.75,
    "text_classification": 0.70,
    "translation": 0.72,
    "question_answering": 0.68,
    "image_captioning": 0.70,
    "visual_question_answering": 0.68,
    "text_to_image": 0.65,
}


@pytest.mark.parametrize(("task", "factor"), FACTORS.items())
def test_factor_by_task(task: str, factor: float) -> None:
    assert auto.decay_factor(None, task) == (factor, f"auto: task {task}")


@pytest.mark.parametrize(
    ("images", "factor", "ratio"),
    [
        (999, 0.8, 0.20),
        (1000, 0.7, 0.15),
        (4999, 0.7, 0.15),
        (5000, 0.65, 0.12),
        (19_999, 0.65, 0.12),
        (20_000, 0.6, 0.1),
    ],
)
def test_by_size_of_the_data_set(images: int, factor: float, ratio: float) -> None:
    for task in (None, "general", "computer_vision"):  # none has a factor
        assert auto.decay_factor(images, task) == (factor, f"auto: {images} images")
    assert auto.min_ratio(images) == (ratio, f"auto: {images} images")


def test_a_task_that_is_named_goes_before_the_size_which_is_told_too() -> None:
    assert auto.decay_factor(20, "image_generation") == (0.6, "auto: task image_generation; 0.8 by its 20 images")
    assert auto.decay_factor(6000, "text_to_image") == (0.65, "auto: task text_to_image")  # both have it


def test_defaults_come_last() -> None:
    assert auto.decay_factor(None, None) == auto.decay_factor(None, "general") == (0.7, "auto: default")
    assert auto.min_ratio(None) == (0.1, "auto: default")
    assert auto.transition_steps(10_000, None)[1] == "auto: default, 16% of 10000 steps"


@pytest.mark.parametrize(
    ("complexity", "images", "ratio"),
    [
        (1.0, 999, 0.1),
        (1.0, 1000, 0.075),
        (1.0, 10_000, 0.05),
        (0.1, 10_000, 0.025),
        (9.0, 10, 0.2),
        (1.5, 1000, 0.1125),
    ],
)
def test_least_ratio_by_complexity(complexity: float, images: int, ratio: float) -> None:
    found, _ = auto.min_ratio_of(auto.Complexity(int(complexity * 1000), 1000), images=images)
    assert found == pytest.approx(ratio)


def test_the_complexity_is_told() -> None:
    assert auto.min_ratio_of(auto.Complexity(139776, 20480), images=20)[1] == (
        "complexity 6.83: 139,776 trained numbers for 20,480 in the latents of 20 images"
    )


def test_the_option_knows_every_task_and_domain() -> None:
    choices = set(get_args(get_args(get_type_hints(WeightDecayOptions)["task"])[0]))
    assert choices == {"general", *auto.FACTORS, *(task for tasks in auto.FACTORS.values() for task in tasks)}
    assert auto.RATIOS.keys() <= choices
