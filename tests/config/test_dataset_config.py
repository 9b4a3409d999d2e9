"""What is trained: dataset files of every level, image folders, and the messages for mistakes in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toml

from library.config.data.dataset_config import DatasetSpec, load_datasets
from library.config.data.masks import check_masks
from library.config.options import Options
from library.errors import UserError

Parse = Callable[..., Options]

SMALL = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1

[[datasets]]
resolution = [512, 768]
batch_size = 4
keep_tokens = 2
num_repeats = 5

  [[datasets.subsets]]
  image_dir = "images/a"
  keep_tokens = 3
  class_tokens = "sks cat"

  [[datasets.subsets]]
  image_dir = "images/b"
  is_reg = true
  num_repeats = 2
  shuffle_caption = false
  caption_prefix = ""

[[datasets]]
resolution = 256
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "images/c"
"""


def load(folder: Path, options: Parse, text: str, *words: str) -> tuple[DatasetSpec, ...]:
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return load_datasets(options("--dataset_config", "data.toml", *words))


@pytest.mark.parametrize(
    ("text", "words", "size"),
    [
        ("", (), None),
        ("skip_image_resolution = 256", (), (256, 256)),
        ("skip_image_resolution = [256, 128]", (), (256, 128)),
        ('skip_image_resolution = "256,128"', (), (256, 128)),
        ("skip_image_resolution = 0", (), None),
        ("", ("--skip_image_resolution", "256,128"), (256, 128)),
    ],
)
def test_the_size_of_images_to_leave_out(
    text: str, words: tuple[str, ...], size: tuple[int, int] | None, folder: Path, options: Parse
) -> None:
    content = f"[[datasets]]\nresolution = 512\n{text}\n[[datasets.subsets]]\nimage_dir = 'images/a'\n"
    (spec,) = load(folder, options, content, *words)
    assert spec.skip_image_resolution == size


def sizes(folder: Path, options: Parse, text: str, *words: str) -> list[tuple[int, int]]:
    return [spec.resolution for spec in load(folder, options, text, *words)]


def test_several_resolutions(folder: Path, options: Parse) -> None:
    """One data set for each: the nearest level that has either key counts."""
    own = "[[datasets]]\n{}\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    squares = [(512, 512), (768, 768)]
    assert sizes(folder, options, own.format("resolutions = [512, 768]")) == squares
    assert sizes(folder, options, own.format("resolutions = '512, 768'")) == squares
    assert sizes(folder, options, own.format("resolutions = [[512, 768], [768, 512]]")) == [(512, 768), (768, 512)]
    general = "[general]\nresolutions = [512, 768]\n"
    both = general + own.format("") + own.format("resolution = 64")
    assert sizes(folder, options, both, "--resolution", "32") == [*squares, (64, 64)]
    assert sizes(folder, options, own.format(""), "--resolutions", "512", "768x512") == [(512, 512), (768, 512)]
    specs = load(folder, options, own.format("resolutions = [512, 768]\nbatch_size = 3"))
    assert specs[0] == replace(specs[1], resolution=(512, 512))
    (folder / "train" / "1_a").mkdir(parents=True)
    by_words = load_datasets(options("--train_data_dir", "train", "--resolutions", "512,768"))
    assert [spec.resolution for spec in by_words] == squares
    with pytest.raises(UserError, match="--resolution and --resolutions: give one of them"):
        options("--resolution", "512", "--resolutions", "512,768")


def test_resolutions_of_the_command_line_win_over_a_presets_resolution(folder: Path, options: Parse) -> None:
    data = options("--preset", "sd15_style", "--resolutions", "512", "768").data
    assert (data.resolution, data.resolutions) == (None, ((512, 512), (768, 768)))
    (folder / "mine.toml").write_text("[a]\nresolutions = [64, 96]\n", encoding="utf-8")
    assert options("--config_file", "mine.toml").data.resolutions == ((64, 64), (96, 96))
    assert options("--config_file", "mine.toml", "--resolution", "32").data.resolutions is None
    (folder / "mine.toml").write_text("[a]\nresolutions = [64, 96]\nresolution = 64\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--resolution and --resolutions: give one of them\n  mine\.toml"):
        options("--config_file", "mine.toml")


def test_levels(folder: Path, options: Parse) -> None:
    words = ["--flip_aug", "--caption_prefix", "art,", "--train_batch_size", "8", "--dataset_repeats", "7"]
    first, second = load(folder, options, SMALL, *words, "--bucket_reso_steps", "32")
    a, b = first.subsets
    assert (first.resolution, second.resolution) == ((512, 768), (256, 256))
    assert (first.batch_size, second.batch_size) == (4, 8)  # its own, the option's
    assert (first.enable_bucket, second.enable_bucket) == (False, True)
    assert second.bucket_reso_steps == 32
    assert (a.keep_tokens, b.keep_tokens, second.subsets[0].keep_tokens) == (3, 2, 1)  # subset, dataset, general
    assert (a.num_repeats, b.num_repeats, second.subsets[0].num_repeats) == (5, 2, 7)
    assert (a.shuffle_caption, b.shuffle_caption) == (True, False)
    assert (a.class_tokens, b.class_tokens) == ("sks cat", None)
    assert (a.is_reg, b.is_reg) == (False, True)
    assert a.flip_aug
    assert a.caption_extension == ".txt"
    assert (a.caption_prefix, b.caption_prefix) == ("art,", None)  # "" switches it off, as in kohya
    assert a.image_dir == Path("images/a")
    assert b.origin == "data.toml: [[datasets]] 1, [[datasets.subsets]] 2"


def test_json_is_the_same(folder: Path, options: Parse) -> None:
    (folder / "data.json").write_text(json.dumps(toml.loads(SMALL)), encoding="utf-8")
    from_json = load_datasets(options("--dataset_config", "data.json"))
    assert str(from_json).replace("data.json", "data.toml") == str(load(folder, options, SMALL))


ONE = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "a"\n'
HEAD = "data.toml: "
PLACE = HEAD + "[[datasets]] 1, [[datasets.subsets]] 1: "
UNSUPPORTED = "known to kohya's scripts, not supported here yet"

MISTAKES = {
    ONE + "num_repeat = 3\n": PLACE + "num_repeat: unknown key, did you mean 'num_repeats'?",
    ONE + "num_repeats = '3'\n": PLACE + 'num_repeats: "3" is not a whole number',
    ONE + "num_repeats = true\n": PLACE + "num_repeats: true is not a whole number",
    ONE + "shuffle_caption = 1\n": PLACE + "shuffle_caption: 1 is not true or false",
    ONE + "caption_prefix = 5\n": PLACE + "caption_prefix: 5 is not text in quotes",
    ONE + "keep_tokens = -1\n": PLACE + "keep_tokens: must be at least 0, not -1",
    ONE + "resolution = 64\n": PLACE + "resolution: belongs to [general] or [[datasets]], not to [[datasets.subsets]]",
    "[general]\nimage_dir = 'x'\n" + ONE: HEAD
    + "[general]: image_dir: belongs to [[datasets.subsets]], not to [general]",
    "[general]\nresolution = '64;64'\n" + ONE: HEAD
    + "[general]: resolution: '64;64' is not a size in pixels such as 512 "
    "or 512,768 (width,height)",
    "[general]\nresolution = [64, 64, 3]\n" + ONE: HEAD
    + "[general]: resolution: [64, 64, 3] is neither a whole number of "
    "pixels nor [width, height]",
    "[general]\nresolutions = [64, 96, 64]\n" + ONE: HEAD + "[general]: resolutions: '64,96,64' has 64x64 twice",
    "[general]\nresolutions = [64.5]\n" + ONE: HEAD
    + "[general]: resolutions: '64.5' is not a size in pixels such as 512 or 512,768 (width,height)",
    "[[datasets]]\nresolution = 64\nresolutions = [64, 96]\n[[datasets.subsets]]\nimage_dir = 'a'\n": HEAD
    + "[[datasets]] 1: resolution and resolutions: give one of them",
    "[general]\nbatch_size = 0\n" + ONE: HEAD + "[general]: batch_size: must be at least 1, not 0",
    "[generals]\nbatch_size = 1\n" + ONE: HEAD
    + "generals: only [general] and [[datasets]] can stand at the top, did you "
    "mean 'general'?",
    "[[general]]\nbatch_size = 1\n" + ONE: HEAD + "[general]: is a table of keys and values, not a list",
    "[general]\nbatch_size = 1\n": HEAD + "[[datasets]]: is missing",
    "[datasets]\nresolution = 64\n": HEAD + "[[datasets]]: is a list of tables: write two brackets on each side",
    "[[datasets]]\nresolution = 64\n": HEAD + "[[datasets]] 1, [[datasets.subsets]]: is missing",
    "[[datasets]]\nresolution = 64\n[datasets.subsets]\nimage_dir = 'a'\n": HEAD
    + "[[datasets]] 1, [[datasets.subsets]]: "
    "is a list of tables: write two brackets on each side",
    "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nis_reg = true\n": PLACE
    + "image_dir is missing: the folder of "
    "the images",
    "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n": HEAD + "[[datasets]] 1: no resolution: set it here or in "
    "[general], or give --resolution",
    ONE + "num_repeats = 0\n": HEAD + "[[datasets]] 1: no subset is left to train on",
    ONE + "random_crop = 1\n": PLACE + "random_crop: 1 is not true or false",
    ONE + "face_crop_aug_range = [4.0, 2.0]\n": PLACE + "face_crop_aug_range: '4.0,2.0' is not a range such as 2.0,4.0",
    ONE + "face_crop_aug_range = 2.0\n": PLACE + "face_crop_aug_range: '2.0' is not a range such as 2.0,4.0",
    ONE + "resize_interpolation = 'lanczo'\n": PLACE
    + "resize_interpolation: 'lanczo' is not one of lanczos, nearest, bilinear, linear, bicubic, cubic, area, box, "
    "did you mean 'lanczos'?",
    "[general]\nalpha_mask = true\n" + ONE: HEAD
    + "[general]: alpha_mask: belongs to [[datasets.subsets]], not to [general]",
    ONE + "custom_attributes = 5\n": PLACE + "custom_attributes: 5 is not a table such as { name = 1 }",
    ONE + "custom_attributes = { diff_output_preservation = 1 }\n": PLACE
    + "custom_attributes: diff_output_preservation: 1 is not true or false",
    ONE + "prior = 'bases'\n": PLACE + "prior: \"bases\" is not one of base, previous, did you mean 'base'?",
    ONE + "prior = 'previous'\n": PLACE[:-2]
    + ': prior = "previous" is the network of --network_weights, which is missing',
    ONE + "prior_weight = 0.5\n": PLACE + 'prior_weight: needs prior = "base" or "previous"',
    ONE + "prior = 'base'\nprior_weight = -1\n": PLACE + "prior_weight: must be at least 0, not -1",
    ONE + "prior = 'base'\nprior_region = 'outside_mask'\n": PLACE
    + "prior_region: no mask: give alpha_mask or conditioning_data_dir",
    ONE + "prior = 'base'\nprior_region = 'outside_mask'\nis_reg = true\n": PLACE
    + "prior_region: regularisation images have nothing to learn in a mask",
    ONE + "prior = 'previous'\ncustom_attributes = { diff_output_preservation = true }\n": PLACE[:-2]
    + ': prior = "previous" and diff_output_preservation, which is "base": give one of them',
    ONE + "caption_dropout_rate = 1.5\n": PLACE + "caption_dropout_rate: must be at most 1, not 1.5",
    ONE + "token_warmup_step = '9'\n": PLACE + 'token_warmup_step: "9" is not a number',
    ONE + "metadata_file = 'm.json'\ncaption_extension = '.txt'\n": PLACE
    + "caption_extension: belongs to a folder of images, not to a metadata_file",
    ONE + "[[datasets.subsets]]\nmetadata_file = 'm.json'\n": HEAD + "[[datasets]] 1: subsets with image_dir alone and "
    "subsets with metadata_file cannot stand together: give each kind [[datasets]] of its own",
    "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 5\n": PLACE
    + "metadata_file: 5 is not text in quotes",
    "[general]\nmetadata_file = 'm.json'\n" + ONE: HEAD
    + "[general]: metadata_file: belongs to [[datasets.subsets]], not to [general]",
    "[general]\nvalidation_split = 1.5\n" + ONE: HEAD + "[general]: validation_split: must be at most 1, not 1.5",
    "[general]\nvalidation_dir = 'v'\n" + ONE: HEAD
    + "[general]: validation_dir: belongs to [[datasets.subsets]], not to [general]",
    ONE + "validation_dir = 'v'\nvalidation_split = 0.1\n": PLACE[:-2]
    + ": validation_dir and validation_split: give one of them",
    ONE + "validation_split = 0.1\nis_reg = true\n": PLACE
    + "validation_split: regularisation images are not validated",
    ONE + "metadata_file = 'm.json'\nvalidation_dir = 'v'\n": PLACE
    + "validation_dir: belongs to a folder of images, not to a metadata_file",
    "[general]\nnetwork_multiplier = 0.5\n" + ONE: HEAD + f"[general]: network_multiplier: {UNSUPPORTED}",
    ONE + "keep_tokens = x\n": "data.toml, line 5: 'keep_tokens = x': text needs quotes: keep_tokens = 'x'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text: str, folder: Path, options: Parse) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, options, text)
    assert str(caught.value) == MISTAKES[text]


def test_every_mistake_is_named_at_once(folder: Path, options: Parse) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, options, "[general]\nfoo = 1\nvalidation_split = -1\n" + ONE + "bar = 1\n")
    assert len(str(caught.value).splitlines()) == 3


NEUTRAL = """
alpha_mask = false
cache_info = false
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_tag_dropout_rate = 0.0
color_aug = false
conditioning_data_dir = ""
custom_attributes = {}
enable_wildcard = false
face_crop_aug_range = ""
keep_tokens_separator = ""
metadata_file = ""
random_crop = false
resize_interpolation = ""
secondary_separator = ""
token_warmup_min = 1
token_warmup_step = 0
"""


def test_what_asks_for_nothing_is_taken(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        text = "[general]\nnetwork_multiplier = 1.0\nvalidation_split = 0.0\n" + ONE + NEUTRAL
        assert load(folder, options, text) == load(folder, options, ONE)
    assert caplog.records == []


CAPTIONS = """
[general]
caption_separator = "|"
keep_tokens_separator = "|||"
secondary_separator = ";;;"
enable_wildcard = true
caption_dropout_rate = 1
caption_dropout_every_n_epochs = 2
caption_tag_dropout_rate = 0.25
token_warmup_min = 3
token_warmup_step = 0.5
[[datasets]]
resolution = 64
caption_dropout_rate = 0.5
[[datasets.subsets]]
image_dir = "a"
keep_tokens_separator = ""
secondary_separator = ""
token_warmup_step = 40
"""
CAPTION_WORDS = [
    *("--keep_tokens_separator", "|||", "--secondary_separator", ";;;", "--enable_wildcard"),
    *("--caption_dropout_rate", "0.5", "--caption_dropout_every_n_epochs", "2", "--caption_tag_dropout_rate", "0.25"),
    *("--token_warmup_min", "3", "--token_warmup_step", "40", "--caption_separator", "|"),
]


def test_captions(folder: Path, options: Parse) -> None:
    (dataset,) = load(folder, options, CAPTIONS)
    (by_words,) = load(folder, options, ONE, *CAPTION_WORDS)
    spec = dataset.subsets[0]
    assert (spec.keep_tokens_separator, spec.secondary_separator) == ("", None)  # switched off
    on = replace(spec, keep_tokens_separator="|||", secondary_separator=";;;")
    assert on == by_words.subsets[0]
    assert (spec.caption_dropout_rate, spec.token_warmup_step, spec.enable_wildcard) == (0.5, 40.0, True)


METADATA = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
[[datasets.subsets]]
metadata_file = "meta/m.json"
[[datasets.subsets]]
metadata_file = "n.jsonl"
image_dir = "images"
num_repeats = 3
[[datasets.subsets]]
metadata_file = "n.jsonl"
"""


def test_metadata_files(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    (dataset,) = load(folder, options, METADATA)
    assert [(s.metadata_file, s.image_dir, s.num_repeats) for s in dataset.subsets] == [
        (Path("meta/m.json"), Path("meta"), 1),
        (Path("n.jsonl"), Path("images"), 3),
    ]
    assert "an earlier one has the same metadata_file" in caplog.text
    words = ["--in_json", "n.jsonl", "--train_data_dir", "images", "--resolution", "64", "--dataset_repeats", "3"]
    (by_words,) = load_datasets(options(*words, "--caption_extension", ".txt"))
    (spec,) = by_words.subsets
    assert replace(spec, origin=dataset.subsets[1].origin) == dataset.subsets[1]
    assert spec.origin == "command line: --in_json"
    caplog.clear()
    load_datasets(options(*words, "--reg_data_dir", "reg"))
    assert "--reg_data_dir: has no effect: the data is given by --in_json" in caplog.text


def test_custom_attributes(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    text = "[general]\ncustom_attributes = { diff_output_preservation = true }\n" + ONE
    assert load(folder, options, text)[0].subsets[0].prior == "base"
    (dataset,) = load(folder, options, text + "custom_attributes = { artist = 'x' }\n")
    assert not dataset.subsets[0].prior
    assert [record.getMessage() for record in caplog.records] == [
        PLACE + "custom_attributes: artist has no effect: nothing reads it",
    ]


def test_what_has_no_effect_is_warned_about(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    text = ONE + "[[datasets.subsets]]\nimage_dir = 'a'\n"
    text += "[[datasets.subsets]]\nimage_dir = 'b'\nnum_repeats = 0\n"
    with caplog.at_level(logging.WARNING):
        (dataset,) = load(folder, options, text, "--train_data_dir", "t", "--reg_data_dir", "r", "--in_json", "m.json")
    assert len(dataset.subsets) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "command line: --train_data_dir: has no effect: the data is given by --dataset_config",
        "command line: --reg_data_dir: has no effect: the data is given by --dataset_config",
        "command line: --in_json: has no effect: the data is given by --dataset_config",
        "data.toml: [[datasets]] 1, [[datasets.subsets]] 2: has no effect: an earlier one has the same image_dir",
        "data.toml: [[datasets]] 1, [[datasets.subsets]] 3: is left out: it asks for 0 repeats",
    ]


def test_validation_stands_at_every_level(folder: Path, options: Parse) -> None:
    """A folder of its own goes before a split from further out."""
    text = "[general]\nvalidation_split = 0.25\nvalidation_seed = 3\n" + ONE
    text += "[[datasets.subsets]]\nimage_dir = 'b'\nvalidation_split = 0\n"
    text += "[[datasets.subsets]]\nimage_dir = 'c'\nvalidation_dir = 'v'\n"
    text += "[[datasets.subsets]]\nimage_dir = 'd'\nis_reg = true\n"
    (dataset,) = load(folder, options, text, "--validation_split", "0.5")
    found = [(one.validation_split, one.validation_dir, one.validates) for one in dataset.subsets]
    assert found == [(0.25, None, True), (0.0, None, False), (0.0, "v", True), (0.25, None, False)]
    assert {subset.validation_seed for subset in dataset.subsets} == {3}
    (dataset,) = load(folder, options, ONE, "--validation_split", "0.5", "--validation_seed", "7")
    assert (dataset.subsets[0].validation_split, dataset.subsets[0].validation_seed) == (0.5, 7)


IMAGE_KEYS = """
random_crop = true
color_aug = true
face_crop_aug_range = [2.0, 4.5]
resize_interpolation = "box"
alpha_mask = true
conditioning_data_dir = "masks"
"""


def test_keys_about_images(folder: Path, options: Parse) -> None:
    ((_, other),) = (
        spec.subsets for spec in load(folder, options, ONE + IMAGE_KEYS + "[[datasets.subsets]]\nimage_dir = 'b'\n")
    )
    (own,) = load(folder, options, ONE + IMAGE_KEYS, "--resize_interpolation", "area")[0].subsets
    assert (own.random_crop, own.color_aug, own.alpha_mask) == (True, True, True)
    assert (own.face_crop_aug_range, own.resize_interpolation, own.conditioning_data_dir) == (
        (2.0, 4.5),
        "box",
        "masks",
    )
    assert (other.random_crop, other.face_crop_aug_range, other.alpha_mask) == (False, None, False)
    words = ["--random_crop", "--alpha_mask", "--face_crop_aug_range", "1,2", "--resize_interpolation", "cubic"]
    (given,) = load(folder, options, ONE, *words)[0].subsets
    assert (given.random_crop, given.alpha_mask, given.face_crop_aug_range) == (True, True, (1.0, 2.0))
    assert (given.resize_interpolation, given.conditioning_data_dir) == ("cubic", None)


MASK_MISTAKES = {
    (ONE, "--masked_loss"): "--masked_loss: there are no masks: give --alpha_mask, or conditioning_data_dir in the "
    "subsets of --dataset_config, or leave it out",
    (ONE + "conditioning_data_dir = 'm'\n",): PLACE.rstrip(": ")
    + ": conditioning_data_dir needs --masked_loss: its images are the masks",
    (ONE + "conditioning_data_dir = 'm'\nalpha_mask = true\n", "--masked_loss"): PLACE.rstrip(": ")
    + ": alpha_mask and conditioning_data_dir both name the mask: give one of them",
}


@pytest.mark.parametrize("given", MASK_MISTAKES, ids=range(len(MASK_MISTAKES)))
def test_masks_that_do_not_fit(given: tuple[str, ...], folder: Path, options: Parse) -> None:
    with pytest.raises(UserError) as caught:
        check_masks(load(folder, options, *given), masked_loss="--masked_loss" in given)
    assert str(caught.value) == MASK_MISTAKES[given]


@pytest.mark.parametrize(
    "given", [(ONE,), (ONE, "--alpha_mask"), (ONE + "conditioning_data_dir = 'm'\n", "--masked_loss")], ids=range(3)
)
def test_masks_that_fit(given: tuple[str, ...], folder: Path, options: Parse) -> None:
    check_masks(load(folder, options, *given), masked_loss="--masked_loss" in given)


FILES = {
    "data.yaml": ("x: 1\n", "data.yaml: a data set is described by a .toml or a .json file"),
    "data.json": ('{"general": {},}', "data.json, line 1: not valid JSON: "),
    "list.json": ("[]", "list.json: holds no object with 'general' and 'datasets'"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files(name: str, folder: Path, options: Parse) -> None:
    (folder / name).write_text(FILES[name][0], encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_datasets(options("--dataset_config", name))
    assert str(caught.value).startswith(FILES[name][1])


def test_folders(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10_sks cat", "2_a_b", "3", "0_off", "plain", ".hidden"):
        (folder / "train" / name).mkdir(parents=True)
    (folder / "reg" / "1_cat").mkdir(parents=True)
    words = ["--train_data_dir", "train", "--reg_data_dir", "reg", "--resolution", "64", "--keep_tokens", "1"]
    with caplog.at_level(logging.WARNING):
        (dataset,) = load_datasets(options(*words))
    found = [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets]
    assert found == [
        ("10_sks cat", 10, "sks cat", False),
        ("2_a_b", 2, "a_b", False),
        ("3", 3, "", False),
        ("1_cat", 1, "cat", True),
    ]
    assert {s.keep_tokens for s in dataset.subsets} == {1}
    assert dataset.subsets[0].origin == "command line: --train_data_dir"
    assert [record.getMessage() for record in caplog.records] == [
        "command line: --train_data_dir: folder '0_off' is left out: it asks for 0 repeats",
        "command line: --train_data_dir: folder 'plain' is left out: its name does not begin like 10_",
    ]


def folder_message(options: Parse, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_datasets(options("--resolution", "64", *words))
    return str(caught.value)


NONE = " has no folder named like 10_name (10 repeats of each image)"


def test_folders_that_cannot_be_used(folder: Path, options: Parse) -> None:
    train = folder / "train"
    words = ("--train_data_dir", "train")
    place = "command line: --train_data_dir: "
    assert folder_message(options) == "no images to train on: give --train_data_dir or --dataset_config"
    assert folder_message(options, *words) == place + "no such folder: train"
    train.mkdir()
    assert folder_message(options, *words) == place + "train" + NONE + "; it is empty"
    (train / "cat").mkdir()
    assert folder_message(options, *words) == place + "train" + NONE + "; rename its folders, for example cat to 10_cat"
    (train / "a.PNG").touch()
    advice = f"; images (1) lie directly in it: put them into {Path('train/10_name')}"
    assert folder_message(options, *words) == place + "train" + NONE + advice
    (train / "5_dog").mkdir()
    (train / "5_dog" / "a.jpg").touch()
    inner = str(Path("train/5_dog"))
    expected = f"{place}{inner}{NONE}; it is such a folder itself: give the folder that holds it, train"
    assert folder_message(options, "--train_data_dir", inner) == expected
    with pytest.raises(UserError, match=r"^--resolution is required"):
        load_datasets(options(*words))
