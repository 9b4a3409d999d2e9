"""A tiny Stable Diffusion 3.5 with random weights learns eight images: its transformer, its file and its objective as a
whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_flux_learning import TOKENS, losses_before_and_after


@pytest.mark.slow
def test_the_loss_on_new_noise_falls_by_half(tiny_sd3: Path, tmp_path: Path) -> None:
    """From 5.1 to 1.5; predicting nothing gives 2.0, the mean square of the velocity."""
    from sd3_train_network import main

    more, options = ("--t5xxl_max_token_length", str(TOKENS)), {"t5xxl_max_token_length": TOKENS}
    before, after, of_nothing = losses_before_and_after(main, tiny_sd3, tmp_path, *more, options=options)
    assert after < before / 2, f"{before:.3f} → {after:.3f}"
    assert after < 0.85 * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
