"""The labelled picture, and CLIP's scores in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.evaluation.clip_score import clip_scores
from library.evaluation.grid import LABELS, Tile, grid
from library.models.checkpoints.base_model import ASSETS


def _plain(colour: str, width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_images_lie_beside_each_other_with_room_for_the_labels() -> None:
    colours = [["red", "lime"], ["blue", "magenta"]]
    tiles = [[Tile(_plain(colour, 256, 128), "CLIP 0.250") for colour in row] for row in colours]
    long = "a prompt of a good many words that needs several lines of its own beside the image, all of them legible"
    sheet = np.asarray(grid(tiles, heads=["base", long], labels=[f"{long}\nseed 1", "short"], side=200))
    for row in colours:
        for colour in row:
            seen = np.argwhere((sheet == np.asarray(_plain(colour, 1, 1))[0, 0]).all(axis=2))
            (top, left), (bottom, right) = seen.min(axis=0), seen.max(axis=0)
            assert (bottom - top + 1, right - left + 1) == (100, 200)  # reduced, whole, covered by nothing
            assert len(seen) == 100 * 200
            assert left >= LABELS
    dark = (sheet < 100).all(axis=2)
    assert dark[:, :LABELS].any()
    assert dark[:20, LABELS:].any()


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    sheet = np.asarray(grid([[Tile(_plain("red", 64, 64), "")]], heads=["base"], labels=[""], side=384))
    assert (sheet == (255, 0, 0)).all(axis=2).sum() == 128 * 128


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": 49408, "projection_dim": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer").save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_score_is_the_cosine_of_the_embeddings(clip: Path) -> None:
    """Against the two encoders and the projections by hand. fp32: 1e-5."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    images, texts = [Image.fromarray(one) for one in noise], ["a fox", "word " * 100]
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    wanted = []
    for image, text in zip(images, texts, strict=True):
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=77)["input_ids"]])
        with torch.no_grad():
            of_text = model.text_projection(model.text_model(ids).pooler_output)[0]
            seen = model.vision_model(processor(images=image, return_tensors="pt")["pixel_values"])
            of_image = model.visual_projection(seen.pooler_output)[0]
        wanted.append(float(of_text @ of_image / of_text.norm() / of_image.norm()))
    assert clip_scores(clip, images, texts) == pytest.approx(wanted, abs=1e-5)
    assert wanted[0] != pytest.approx(wanted[1], abs=1e-3)


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="cannot be read as a CLIP model"):
        clip_scores(tmp_path, [_plain("red", 8, 8)], ["a"])
