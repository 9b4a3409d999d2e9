"""Learning rates for fine-tuning language models and classifiers, by task and by size of the base.

The numbers are advice in circulation, not measurements: where to begin, from a tenth of it to ten times of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from library.errors import UserError, did_you_mean

SIZES = {"small": 3e9, "medium": 13e9, "large": math.inf}
"""The most parameters of a base of each size."""

LORA_RATES = {
    "classification": (1e-4, 5e-5, 2e-5),
    "generation": (5e-5, 2e-5, 1e-5),
    "question_answering": (1e-4, 5e-5, 2e-5),
}
"""Task → rates of adapters, in the order of `SIZES`."""

FULL_RATES = {
    "classification": (2e-5, 1e-5, 5e-6),
    "generation": (1e-5, 5e-6, 2e-6),
    "question_answering": (3e-5, 1e-5, 5e-6),
}
"""The same where all weights of the base are trained."""

SYNONYMS = {
    "text_classification": "classification",
    "image_classification": "classification",
    "text_generation": "generation",
}
"""The names that `--task` has for these."""


class TaskRate(NamedTuple):
    """`scheduler`: a name that `transformers.get_scheduler` knows. `warmup`: as a share of all steps."""

    rate: float
    scheduler: str
    warmup: float


def task_rate(task: str, size: str | int, *, full: bool = False) -> TaskRate:
    """The rate for a task and a size of the base: one of `SIZES`, or its number of parameters.

    `full`: all weights are trained, instead of an adapter. Raises UserError for an unknown task or size, with the
    nearest one.
    """
    named = SYNONYMS.get(task, task)
    if named not in LORA_RATES:
        known = (*LORA_RATES, *SYNONYMS)
        raise UserError(f"task: no rate for '{task}'{did_you_mean(task, known) or _all(known)}")
    rates = (FULL_RATES if full else LORA_RATES)[named]
    rate = rates[list(SIZES).index(size_of(size))]
    return TaskRate(rate, "cosine" if named == "generation" else "linear", 0.1 if full else 0.05)


def size_of(size: str | int) -> str:
    """The name of a size, of itself or of a number of parameters. Raises UserError."""
    if isinstance(size, str):
        if size not in SIZES:
            raise UserError(f"size: no '{size}'{did_you_mean(size, SIZES) or _all(SIZES)}")
        return size
    if size <= 0:
        raise UserError(f"size: {size} is no number of parameters")
    return next(name for name, most in SIZES.items() if size <= most)


def _all(known: tuple[str, ...] | dict[str, float]) -> str:
    return f"; there are {', '.join(known)}"
