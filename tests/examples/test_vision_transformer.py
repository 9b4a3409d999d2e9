"""The vision transformer of the example: it learns, and images that look alike are not on both sides."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adapt_vision_transformer as script
from fine_tuning import small_models
from library.errors import UserError
from tests.conftest import IMAGES, ROOT


def run(*words: object) -> tuple[script.Quality, script.Quality]:
    return script.train(script.options([str(word) for word in words]))


def test_it_begins_to_learn() -> None:
    before, after = run("--steps", "40")
    assert after.loss < before.loss - 0.05


@pytest.mark.slow
def test_it_learns_shapes() -> None:
    before, after = run()
    assert before.accuracy < 0.4  # one of four
    assert after.accuracy > 0.9


@pytest.mark.parametrize("preset", ["vision_transformer_adapt", "image_classification"])
def test_presets_tasks_and_layers(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--images", IMAGES / "train", "--steps", "2", "--preset", preset, "--learning_rate", "1e-3")
    run(*words, "--layer_decay", "0.5")
    assert "rate 0.00025 to 0.001 by layer, linear" in capsys.readouterr().out  # patches: below two layers
    run(*words[:-2], "--learning_rate", "1e-3", "--task", "generation")
    assert "rate 0.001, cosine" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers() -> None:
    words = ("--images", IMAGES / "train", "--steps", "3", "--augment", "--seed")
    assert run(*words, 1) == run(*words, 1) != run(*words, 2)


def test_classes_by_folder_and_by_caption(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    assert list(script.find_images(tmp_path).values()) == ["cats", "dogs"]
    (tmp_path / "cats" / "1.txt").write_text("a picture, cat", encoding="utf-8")
    assert list(script.find_images(tmp_path).values()) == ["cat", "dogs"]


def test_images_stand_as_their_exif_says(tmp_path: Path) -> None:
    picture, turned = Image.new("RGB", (8, 8)), Image.Exif()
    picture.paste("white", (0, 0, 8, 4))
    turned[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=turned)
    pixels_CHW = script.load({tmp_path / "a.png": "a"}, 8).pixels[0]
    assert pixels_CHW[:, 0].max() < 0 < pixels_CHW[:, -1].min()


def test_images_that_look_alike_are_on_one_side() -> None:
    pixels, names = small_models.shapes(40)
    darker = (pixels * 0.95 - 0.02).clamp(-1, 1)
    images = script.Labelled(torch.cat([pixels, darker]), names * 2)
    learnt, held = script.split(images, 0.25, seed=0)
    assert len(learnt.classes) + len(held.classes) == 80
    assert 12 <= len(held.classes) <= 20
    for one in held.pixels:
        distance = (learnt.pixels - one).square().mean((1, 2, 3)).min()
        assert distance > 0.01  # a copy would be at most 0.005


def test_every_class_is_held_out_in_its_share() -> None:
    pixels, names = small_models.shapes(200)
    _, held = script.split(script.Labelled(pixels, names), 0.2, seed=0)
    assert [held.classes.count(name) for name in small_models.SHAPES] == [10] * 4


def test_shapes_are_what_they_are_named() -> None:
    pixels, names = small_models.shapes(8)
    assert pixels.shape == (8, 3, 32, 32)
    assert pixels.abs().max() <= 1
    assert names == [*small_models.SHAPES] * 2
    again, _ = small_models.shapes(4)
    assert torch.equal(again, pixels[:4])
    assert not torch.equal(small_models.shapes(4, seed=1)[0], again)


def test_augmented_images_are_shifted_and_mirrored() -> None:
    image = torch.from_numpy(np.arange(64, dtype=np.float32).reshape(1, 8, 8) / 64).expand(3, 8, 8)
    many = script.augmented(image.repeat(200, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    kinds = {tuple(one[0].flatten().tolist()) for one in many}
    assert len(kinds) == 18  # 3 × 3 shifts by at most one pixel, and mirrored
    assert tuple(image[0].flatten().tolist()) in kinds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "quickstart/image"], "no folder, did you mean 'quickstart/images'"),
        (["--images", "configs"], "0 images of 0 classes; two are needed"),
        (["--preset", "vision_transformer"], "no preset 'vision_transformer', did you mean 'vision_transformer_adapt'"),
        (["--task", "clasification"], "no rate for 'clasification', did you mean 'classification'"),
        (["--task", "classification", "--size", "tiny"], "no 'tiny'"),
        (["--size", "small"], "--size: needs --task"),
    ],
)
def test_a_wrong_option(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert script.main(words) == 2
    assert said in capsys.readouterr().err


def test_an_image_without_a_class_and_one_that_is_broken(tmp_path: Path) -> None:
    shutil.copy(next((IMAGES / "train").glob("*.png")), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"has no class: put it into a folder named so, or write a\.txt beside it"):
        script.find_images(tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png: no image can be read"):
        script.load({broken: "x"}, 8)


def test_a_caption_that_is_no_text(tmp_path: Path) -> None:
    shutil.copy(next((IMAGES / "train").glob("*.png")), tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: no UTF-8 text, at byte 3"):
        script.find_images(tmp_path)


def test_nothing_is_left_to_learn() -> None:
    pixels, names = small_models.shapes(4)
    with pytest.raises(UserError, match="a class has no images left to learn"):
        script.split(script.Labelled(pixels, names), 0.9, seed=0)
