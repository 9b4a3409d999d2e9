"""--debug_dataset: one picture of what would be trained, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.config.parser import parse
from library.data.dataset import TrainingData
from library.guidance import contact_sheet
from library.guidance.contact_sheet import BOX, CAPTION_LINES, GAP, WIDTH, shortened, sights, tile, wrapped
from library.run.plan import make_plan
from tests.conftest import BASE


@pytest.fixture
def data(image_folder, tmp_path):
    words = (
        *("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder), "--resolution", "64,48"),
        *("--caption_extension", ".txt", "--output_dir", str(tmp_path / "out"), "--seed", "3", "--flip_aug"),
    )
    return TrainingData(make_plan(parse([*words, "--random_crop", "--shuffle_caption"])).prepared, seed=3)


def test_it_draws_and_does_not_train(train, tmp_path, capsys):
    words = ("--debug_dataset", "--no-cache_latents", "--random_crop", "--color_aug", "--flip_aug")
    assert train(*words) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "test-dataset.png"
    assert f"drew {path}: 12 of 12 images of the first epoch, seed 1. Nothing was trained" in capsys.readouterr().err
    first = path.read_bytes()
    assert train(*words) == 0
    assert path.read_bytes() == first
    assert train(*words, "--seed", "2") == 0
    assert path.read_bytes() != first


def test_what_cannot_be_trained_is_not_drawn(train, tmp_path, capsys):
    assert train("--debug_dataset", "--random_crop") == 2
    assert "cache_latents and random_crop exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_sights_are_those_of_training(data):
    seen = list(sights(data))
    plan = data.plan(0)
    assert len(seen) == 12 == sum(map(len, plan))
    for sight, batch in zip(seen, data.batches(plan, epoch=0, loader=data.loader(workers=0)), strict=True):
        assert sight.sample == batch.samples[0].sample
        assert sight.caption == batch.captions[0]
        assert sight.pixels.equal(batch.pixels[0])
        assert sight.view.offset == batch.crops[0]
    assert len(list(sights(data, most=5))) == 5


def test_the_tile_shows_the_very_pixels(data):
    sight = next(sight for sight in sights(data) if sight.view.flip)
    image = np.asarray(tile(sight))
    assert image.shape[1:] == (WIDTH, 3)
    height = round(BOX * 48 / 64)
    top = (BOX - height) // 2
    seen = image[top : top + height, BOX + GAP :]
    rows, columns = ((np.arange(n) * k // n) for n, k in ((height, 48), (BOX, 64)))
    expected = ((sight.pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round()[rows][:, columns]
    assert np.abs(seen - expected).mean() < 6  # nearest pixels, counted from their middles


@pytest.mark.parametrize(
    "text", ["a", "word " * 200, "x" * 500, "x" * 90 + " y", "W" * 90, "two\nlines, and  spaces", "日本語" * 150, ""]
)
def test_text_fits(text):
    font = contact_sheet.font()
    lines = wrapped(text, font, width=WIDTH, most=CAPTION_LINES)
    assert 1 <= len(lines) <= CAPTION_LINES
    assert all(font.getlength(line) <= WIDTH for line in lines)
    assert all(lines) or not text
    if len(text) > 300:
        assert lines[-1].endswith("…")
    elif len(text) < 40:
        assert lines == [" ".join(text.split())]


def test_names_lose_their_middle():
    font = contact_sheet.font()
    assert shortened("owl.png", font, width=WIDTH) == "owl.png"
    for name in ("a_long_name_" * 20 + "7.png", "x" * 300):
        short = shortened(name, font, width=WIDTH)
        assert font.getlength(short) <= WIDTH
        assert short.startswith(name[:10])
        assert short.endswith(name[-10:])


def test_many_images_make_a_sheet_of_some(train, tmp_path, image_folder):
    (image_folder / "2_style").rename(image_folder / "50_style")
    assert train("--debug_dataset") == 0
    with Image.open(tmp_path / "out" / "test-dataset.png") as image:
        assert image.width < 2000
        assert image.height < 2200
