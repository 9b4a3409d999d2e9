"""The numbers of a weight-decay curve that are computed from the run: from its length, its data and its task.

Each function returns the number and the deciding rule in words. A task that was named decides the decay factor and the
steps; the size of the data set decides the least ratio, and the factor where no task was named or it has none.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_FACTOR, DEFAULT_MIN_RATIO = 0.7, 0.1

# domain → task → decay factor
FACTORS = {
    "computer_vision": {
        "image_classification": 0.65,
        "object_detection": 0.70,
        "image_generation": 0.60,
        "image_segmentation": 0.68,
    },
    "natural_language": {
        "text_generation": 0.75,
        "text_classification": 0.70,
        "translation": 0.72,
        "question_answering": 0.68,
    },
    "multimodal": {"image_captioning": 0.70, "visual_question_answering": 0.68, "text_to_image": 0.65},
}
# share of the run before the transition, by task or domain
RATIOS = {
    "text_generation": 0.15,
    "image_classification": 0.20,
    "image_generation": 0.12,
    "multimodal": 0.18,
    "general": 0.16,
}
# images below → decay factor, least ratio
BY_SIZE = ((1_000, 0.8, 0.20), (5_000, 0.7, 0.15), (20_000, 0.65, 0.12), (float("inf"), 0.6, 0.10))

Decided = tuple[float, str]


def domain_of(task: str) -> str:
    """The domain that a task belongs to; "general" and the name of a domain are returned as they are."""
    return next((domain for domain, tasks in FACTORS.items() if task in tasks), task)


def transition_steps(total_steps: int, task: str | None) -> tuple[int, str]:
    """T = clamp(total_steps * ratio of the task, 500, 2000); a quarter of short runs, a tenth of long ones."""
    if total_steps < 3000:
        return max(500, int(total_steps * 0.25)), "auto: a run below 3,000 steps"
    if total_steps > 20000:
        return max(1500, int(total_steps * 0.10)), "auto: a run above 20,000 steps"
    named = next((name for name in (task, task and domain_of(task)) if name in RATIOS), None)
    rule = "auto: default" if named in (None, "general") else f"auto: task {task}"
    ratio = RATIOS[named or "general"]
    return min(max(int(total_steps * ratio), 500), 2000), f"{rule}, {ratio:.0%} of {total_steps} steps"


def decay_factor(images: int | None, task: str | None) -> Decided:
    """The decay factor. `images`: the number of distinct training images; None: unknown."""
    by_size = None if images is None else _size(images)[1]
    if task is not None and (of_task := FACTORS.get(domain_of(task), {}).get(task)) is not None:
        instead = "" if by_size is None or by_size == of_task else f"; {by_size:g} by its {images} images"
        return of_task, f"auto: task {task}{instead}"
    return (DEFAULT_FACTOR, "auto: default") if by_size is None else (by_size, f"auto: {images} images")


def min_ratio(images: int | None) -> Decided:
    """The least ratio by the number of images."""
    return (DEFAULT_MIN_RATIO, "auto: default") if images is None else (_size(images)[2], f"auto: {images} images")


class Complexity(NamedTuple):
    """How much a network could learn by heart: its trained numbers over those of its data, the latents."""

    parameters: int
    values: int

    @property
    def ratio(self) -> float:
        return self.parameters / self.values


def min_ratio_of(complexity: Complexity, *, images: int) -> Decided:
    """0.05 * clamp(complexity, 0.5, 2) * (2 below 1,000 images, 1.5 below 10,000, else 1)."""
    of_data = 1.0 if images >= 10_000 else 1.5 if images >= 1_000 else 2.0
    numbers = f"{complexity.parameters:,} trained numbers for {complexity.values:,} in the latents of {images} images"
    return 0.05 * min(max(complexity.ratio, 0.5), 2.0) * of_data, f"complexity {complexity.ratio:.3g}: {numbers}"


def _size(images: int) -> tuple[float, float, float]:
    return next(row for row in BY_SIZE if images < row[0])
