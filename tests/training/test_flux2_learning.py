"""A tiny FLUX.2 klein with random weights learns eight images: its transformer, file and objective as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_flux_learning import losses_before_and_after


@pytest.mark.slow
def test_the_loss_on_new_noise_falls(tiny_flux2: Path, tmp_path: Path) -> None:
    """From 6.3 to 1.7 in two minutes of one slow thread; predicting nothing gives 2.9, the velocity's mean square."""
    from flux2_train_network import main

    more, options = ("--qwen3_max_token_length", "48"), {"qwen3_max_token_length": 48}
    before, after, of_nothing = losses_before_and_after(main, tiny_flux2, tmp_path, *more, options=options)
    assert after < before / 2, f"{before:.3f} → {after:.3f}"
    assert after < 0.75 * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
