"""A tiny Chroma with random weights learns eight images: its transformer, its file and its objective as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_flux_learning import losses_before_and_after


@pytest.mark.slow
def test_the_loss_on_new_noise_falls(tiny_chroma: Path, tmp_path: Path) -> None:
    """From 2.7 to 1.57 in 40 s of one thread; predicting nothing gives 1.90, the velocity's mean square. Its answer
    before training is nearer to that than FLUX.1's, so half of it is no bound."""
    from flux_train_network import main

    before, after, of_nothing = losses_before_and_after(main, tiny_chroma, tmp_path)
    assert after < 0.7 * before, f"{before:.3f} → {after:.3f}"
    assert after < 0.85 * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
