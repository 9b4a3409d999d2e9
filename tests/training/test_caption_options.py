"""Every option about captions through the real command line: four steps each, and what the file says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.training.step import condition_of
from tests.quick import slow
from tests.training.written import ROUNDED, distance, metadata, weights


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that reach the text encoder, in order."""
    seen: list[str] = []

    def spy(batch, *arguments, **options):  # type: ignore[no-untyped-def]
        seen.extend(batch.captions)
        return condition_of(batch, *arguments, **options)

    monkeypatch.setattr("library.training.step.condition_of", spy)
    return seen


@pytest.fixture
def captioned(image_folder: Path) -> Path:
    """The images with captions of tags, marks, groups and wildcards, two of them with a second line."""
    for i, file in enumerate(sorted(image_folder.glob("*/*.txt"))):
        more = "\nanother line, {x|y}" if i < 2 else ""
        file.write_text(f"icon {i} ||| red;;;round, {{flat|matte}}, (bright:1.4), soft{more}\n", encoding="utf-8")
    return image_folder


@pytest.mark.slow
def test_all_of_them_at_once(
    train: Callable[..., int], captioned: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("--shuffle_caption", "--keep_tokens_separator", "|||", "--secondary_separator", ";;;", "--enable_wildcard"),
        *("--caption_prefix", "art,", "--caption_suffix", ", end", "--caption_tag_dropout_rate", "0.1"),
        *("--caption_dropout_rate", "0.1", "--token_warmup_min", "2", "--token_warmup_step", "2"),
        *("--weighted_captions", "--max_token_length", "150", "--clip_skip", "2"),
    ]
    assert train(*words) == 0
    assert len(texts) == 8
    full = [text for text in texts if text]
    assert all(text.startswith("art, icon ") or "another line" in text or "end" in text for text in full)
    assert any("red,round" in text for text in full)
    assert not any(mark in text for text in full for mark in ("|", ";", "{"))
    facts = metadata(tmp_path)
    assert (facts["ss_caption_dropout_rate"], facts["ss_caption_tag_dropout_rate"]) == ("0.1", "0.1")
    assert (facts["ss_clip_skip"], facts["ss_max_token_length"]) == ("2", "150")
    assert train(*words, "--dry_run") == 0
    report = capsys.readouterr().out
    assert "(changes each time: caption_dropout_rate 0.1, enable_wildcard, token_warmup_step 2, " in report
    assert f"trained for example: '{texts[0]}'" in report


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        slow((["--caption_dropout_every_n_epochs", "1"], {""})),
        (["--caption_tag_dropout_rate", "1", "--keep_tokens", "1"], {f"icon {i} ||| red;;;round" for i in range(6)}),
        slow(
            (
                ["--secondary_separator", ";;;"],
                {f"icon {i} ||| red,round, {{flat|matte}}, (bright:1.4), soft" for i in range(6)},
            )
        ),
        (
            ["--token_warmup_step", "100", "--keep_tokens_separator", "|||"],
            {f"icon {i}, red;;;round" for i in range(6)},
        ),
    ],
)
def test_the_text_that_is_trained(
    train: Callable[..., int], captioned: Path, texts: list[str], words: list[str], expected: set[str]
) -> None:
    assert train(*words) == 0
    assert len(texts) == 8
    assert set(texts) <= expected


@pytest.mark.slow
def test_the_separator_in_force_is_used_throughout(
    train: Callable[..., int], image_folder: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in image_folder.glob("*/*.txt"):
        file.write_text("red fox;night sky, stars;hill\n", encoding="utf-8")
    words = ("--shuffle_caption", "--keep_tokens", "1", "--caption_separator")
    assert train(*words, ";") == 0
    assert set(texts) == {"red fox; night sky, stars; hill", "red fox; hill; night sky, stars"}
    (counts,) = json.loads(metadata(tmp_path)["ss_tag_frequency"]).values()
    assert counts == {"red fox": 6, "night sky, stars": 6, "hill": 6}
    assert "occurs in no caption" not in capsys.readouterr().err
    assert train(*words, "|", "--dry_run") == 0
    said = capsys.readouterr()
    assert "the caption_separator '|' occurs in no caption of" in said.err


def test_weights_change_what_is_learnt(train: Callable[..., int], captioned: Path, tmp_path: Path) -> None:
    for name, words in (("plain", []), ("weighted", ["--weighted_captions"])):
        assert train("--output_name", name, "--max_train_steps", "2", *words) == 0
    plain, weighted = weights(tmp_path, "plain"), weights(tmp_path, "weighted")
    assert any(not torch.equal(plain[key], weighted[key]) for key in plain)


@pytest.mark.slow
def test_cached_weighted_text_is_the_same(train: Callable[..., int], captioned: Path, tmp_path: Path) -> None:
    common = ("--network_train_unet_only", "--weighted_captions", "--train_batch_size", "1")
    assert train(*common, "--output_name", "fresh") == 0
    assert train(*common, "--output_name", "cached", "--cache_text_encoder_outputs") == 0
    # captions are encoded in batches of another size
    assert distance(weights(tmp_path, "cached"), weights(tmp_path, "fresh")) < ROUNDED


@pytest.mark.parametrize(
    "words", [["--caption_dropout_rate", "0.1"], ["--enable_wildcard"], ["--token_warmup_step", "9"]]
)
def test_a_text_cache_is_refused_before_training(
    train: Callable[..., int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--network_train_unet_only", "--cache_text_encoder_outputs", *words) == 2
    message = capsys.readouterr().err
    assert f"cache_text_encoder_outputs and {words[0].removeprefix('--')} exclude each other" in message


def test_in_json(train: Callable[..., int], image_folder: Path, texts: list[str], tmp_path: Path) -> None:
    images = image_folder / "2_style"
    entries = {path.stem: {"caption": "an icon", "tags": path.stem} for path in images.glob("*.png")}
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    words = ["--in_json", str(tmp_path / "meta.json"), "--train_data_dir", str(images), "--dataset_repeats", "3"]
    assert train(*words) == 0
    assert len(texts) == 8
    assert set(texts) <= {f"an icon,{stem}" for stem in entries}
    facts = metadata(tmp_path)
    assert facts["ss_num_train_images"] == "18"
    assert json.loads(facts["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 3, "img_count": 6}}
    assert json.loads(facts["ss_tag_frequency"])["meta.json"]["an icon"] == 6


# As kohya's manual and users' files have it: what holds for all in [general], two kinds of data sets
DATASET = """
[general]
resolution = 64
batch_size = 2
shuffle_caption = true
caption_extension = ".txt"
keep_tokens_separator = "|||"
secondary_separator = ";;;"
enable_wildcard = true
caption_tag_dropout_rate = 0.1

[[datasets]]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128

  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 2
  class_tokens = "icon"
  caption_prefix = "1girl, hatsune miku |||"
  caption_suffix = ", anime screencap ||| masterpiece"
  token_warmup_min = 1
  token_warmup_step = 0.5

[[datasets]]
caption_dropout_rate = 0.05
caption_dropout_every_n_epochs = 3

  [[datasets.subsets]]
  metadata_file = "{meta}"
  image_dir = "{images}"
  custom_attributes = {{ artist = "someone" }}
"""


@pytest.mark.slow
def test_a_dataset_config_of_both_kinds(
    train: Callable[..., int], captioned: Path, texts: list[str], tmp_path: Path
) -> None:
    images = captioned / "2_style"
    lines = [json.dumps({"image_path": path.name, "caption": "a\nb", "tags": "t"}) for path in images.glob("*.png")]
    (tmp_path / "meta.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = DATASET.format(images=images.as_posix(), meta=(tmp_path / "meta.jsonl").as_posix())
    (tmp_path / "data.toml").write_text(config, encoding="utf-8")
    assert train("--train_data_dir=", "--dataset_config", str(tmp_path / "data.toml"), "--max_train_steps", "9") == 0
    assert {text for text in texts if text and "1girl" not in text} <= {"a, t", "t, a", "b, t", "t, b", "a", "b", "t"}
    girls = [text for text in texts if "1girl" in text]
    assert girls
    assert all(text.startswith("1girl, hatsune miku") and text.endswith("masterpiece") for text in girls)
    first, second = json.loads(metadata(tmp_path)["ss_datasets"])
    assert (first["is_dreambooth"], second["is_dreambooth"]) == (True, False)
    (by_folder,), (by_file,) = first["subsets"], second["subsets"]
    assert by_folder["keep_tokens_separator"] == "|||"
    assert by_folder["secondary_separator"] == ";;;"
    assert by_folder["enable_wildcard"]
    assert "metadata_file" not in by_folder
    assert (by_file["metadata_file"], by_file["image_dir"]) == ("meta.jsonl", "2_style")
    assert not {"class_tokens", "is_reg"} & by_file.keys()
