"""Runs with shares and several resolutions, from the command line to the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.conftest import copy_images, run_training
from tests.training.test_resume import stop_after, told
from tests.training.written import same, weights

Train = Callable[..., int]

DATA = """
[general]
caption_extension = ".txt"
[[datasets]]
resolutions = [64, 96]
batch_size = 2
validation_split = 0.17
  [[datasets.subsets]]
  image_dir = "{0}/data/2_style"
  [[datasets.subsets]]
  image_dir = "{0}/reg"
  is_reg = true
  share = 0.25
"""


@pytest.fixture
def mixed(tmp_path: Path, train: Train) -> Train:
    """`train` with a data set file: six images to learn, one held out, and three of regularisation, at two sizes."""
    copy_images(tmp_path / "reg", count=3)
    for file in (tmp_path / "reg").iterdir():
        file.rename(file.with_name(f"r-{file.name}"))  # other images, as far as their contents go:
    for file in (tmp_path / "reg").glob("*.png"):
        file.write_bytes(file.read_bytes() + b"\0")
    (tmp_path / "data.toml").write_text(DATA.format(tmp_path.as_posix()), encoding="utf-8")
    caches = ("--cache_latents_to_disk", "--cache_dir", str(tmp_path / "cache"))
    return lambda *words: run_training(tmp_path, "--dataset_config", str(tmp_path / "data.toml"), *caches, *words)


@pytest.mark.slow
def test_shares_at_two_resolutions(mixed: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed("--max_train_steps", "2") == 0
    said = capsys.readouterr().err
    assert said.count("1 images are held out for validation; 8 are left to train") == 1
    assert "latents on disk: 0 read (0.0 MB), 16 encoded" in said  # eight images at two sizes
    name = str(tmp_path / "reg")
    assert f"{name} at 96 × 96: 25 % of its data set, 2 an epoch, each image 0.667 times on average" in said
    assert "an epoch has 8 of them (8 batches)" in said
    with safe_open(tmp_path / "out" / "test.safetensors", framework="pt") as file:
        metadata = file.metadata()
    datasets = json.loads(metadata["ss_datasets"])
    assert [(one["resolution"], one["num_train_images"], one["num_reg_images"]) for one in datasets] == [
        ([64, 64], 6, 2),
        ([96, 96], 6, 2),
    ]


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    mixed: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max_train_steps", "19")  # into the third epoch
    assert mixed(*words, "--output_name", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        assert mixed(*words, "--output_name", "broken") == 130
    assert mixed(*words, "--output_name", "broken", "--resume", "latest", "--max_data_loader_n_workers", "2") == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "broken"))
    assert told(tmp_path, "whole") == told(tmp_path, "broken")
