"""Weight-decay curves: step → factor on the configured weight decay. `step` counts optimizer steps from 1."""

from __future__ import annotations


def exponential(
    step: int, *, transition_steps: int, decay_factor: float, min_ratio: float, max_progress: float
) -> float:
    """1 up to `transition_steps` T, then max(min_ratio, decay_factor ** p) with p = min((step - T) / T, max_progress).

    With the usual numbers (1000, 0.7, 0.1, 2.0): step 1000 → 1, 1500 → 0.8367, 2000 → 0.7, 3000 and later → 0.49.
    The cap on p keeps the curve above `min_ratio` there; max_progress = inf lets it fall on (5000 → 0.24, floor 0.1
    from step 7456).
    """
    if step <= transition_steps:
        return 1.0
    progress = min((step - transition_steps) / transition_steps, max_progress)
    return max(min_ratio, decay_factor**progress)
