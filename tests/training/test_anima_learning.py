"""A tiny Anima with random weights learns eight images: its transformer, its file and its objective as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_flux_learning import losses_before_and_after


@pytest.mark.slow
def test_the_loss_on_new_noise_falls(tiny_anima: Path, tmp_path: Path) -> None:
    """From 6.4 to 1.5 in 77 s of a thread beside another; predicting nothing gives 2.3, the velocity's mean square."""
    from anima_train_network import main

    before, after, of_nothing = losses_before_and_after(main, tiny_anima, tmp_path)
    assert after < before / 2, f"{before:.3f} → {after:.3f}"
    assert after < 0.85 * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
