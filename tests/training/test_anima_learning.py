"""A tiny Anima with random weights learns eight images: its transformer, its file and its objective as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.models.opening import open_family
from networks.create import create_to_merge
from networks.files import read
from tests.training.test_flux_learning import learnt, losses_of


@pytest.mark.slow
def test_the_loss_on_new_noise_falls(tiny_anima: Path, tmp_path: Path) -> None:
    """From 6.4 to 1.5 in 77 s of a thread beside another; predicting nothing gives 2.3, the velocity's mean square."""
    from anima_train_network import main

    images = learnt(tmp_path)
    family = open_family(str(tiny_anima))
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    before, of_nothing = losses_of(family, images, seed=12345)
    words = ["--pretrained_model_name_or_path", str(tiny_anima), "--train_data_dir", str(tmp_path / "data")]
    words += ["--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "8", "--seed", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "test", "--no-loss_plot", "--no-report"]
    words += ["--network_dim", "32", "--network_alpha", "32", "--learning_rate", "1e-2", "--lr_scheduler", "cosine"]
    words += ["--network_train_unet_only", "--cache_text_encoder_outputs", "--cache_latents"]
    words += ["--timestep_sampling", "uniform", "--max_train_steps", "300", "--max_data_loader_n_workers", "0"]
    assert main(words) == 0
    file = read(tmp_path / "out" / "test.safetensors")
    network = create_to_merge(file, family.adapter_targets(), multiplier=1.0)
    network.load(file)
    network.merge()
    after, _ = losses_of(family, images, seed=12345)
    assert after < before / 2, f"{before:.3f} → {after:.3f}"
    assert after < 0.85 * of_nothing, f"{after:.3f} of {of_nothing:.3f}"
