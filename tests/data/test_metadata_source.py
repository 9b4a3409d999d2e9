"""JSON files of captions and tags. Expected texts follow kohya-ss/sd-scripts v0.10, FineTuningDataset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.prepare import prepare
from library.data.sources.metadata import scan
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]


@pytest.fixture
def listed(tmp_path: Path, subset: MakeSubset) -> Callable[..., SubsetSpec]:
    """`listed({"a.png": {…}}, **changes)` writes meta.json; images a.png, b.jpg and c.webp lie beside it."""
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / name).touch()

    def make(entries: object, *, name: str = "meta.json", **changes: object) -> SubsetSpec:
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return subset(metadata_file=tmp_path / name, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "entry", "expected"),
    [
        ({}, {"caption": "a cat", "tags": "x, y"}, "a cat,x, y"),
        ({}, {"caption": "a cat"}, "a cat"),
        ({}, {"tags": "x, y"}, "x, y"),
        ({}, {"caption": None, "tags": ""}, ""),
        ({}, {}, ""),
        ({"caption_separator": "|"}, {"caption": "a cat", "tags": "x|y"}, "a cat|x|y"),
        ({"enable_wildcard": True}, {"caption": "one\ntwo\n\n", "tags": "x, y"}, "one,x, y\ntwo,x, y"),
        ({"enable_wildcard": True}, {"caption": "one\ntwo", "tags": None}, "one\ntwo"),
        ({"enable_wildcard": True}, {"caption": "one", "tags": "x\ny"}, "one,x,y"),
        # where kohya loses the tags
        ({"enable_wildcard": True}, {"tags": "x, y"}, "x, y"),
        ({}, {"caption": "one\ntwo", "tags": "x, y"}, "one,x, y"),
        ({}, {"caption": "a cat", "tags": "x\ny"}, "a cat,x,y"),
    ],
)
def test_caption_and_tags(listed: Callable[..., SubsetSpec], changes: dict, entry: dict, expected: str) -> None:
    (sample,) = scan(listed({"a.png": entry}, **changes), 0).samples
    assert sample.caption == expected


def test_images_with_and_without_extension_relative_and_absolute(
    tmp_path: Path, listed: Callable[..., SubsetSpec]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.v2.png").touch()
    entry = {"caption": "x", "image_size": [1, 1], "train_resolution": [64, 64]}
    images = ["c", "sub/d.v2", "a.png", str(tmp_path / "b.jpg")]
    samples, summary = scan(listed(dict.fromkeys(images, entry), num_repeats=3), 7)
    assert {(s.path, s.key) for s in samples} == {
        (tmp_path / "a.png", "7/a.png"),
        (tmp_path / "b.jpg", "7/b.jpg"),
        (tmp_path / "c.webp", "7/c"),
        (tmp_path / "sub" / "d.v2.png", "7/sub/d.v2"),
    }
    assert {s.repeats for s in samples} == {3}
    assert (summary.images, summary.captions_found, summary.captions_missing) == (4, 4, 0)


def test_the_order_in_the_file_does_not_matter(listed: Callable[..., SubsetSpec]) -> None:
    one = scan(listed({"c": {}, "a": {}, "b": {}}), 0).samples
    other = scan(listed({"b": {}, "c": {}, "a": {}}), 0).samples
    assert [sample.key for sample in one] == [sample.key for sample in other] == ["0/a", "0/b", "0/c"]


def test_jsonl(listed: Callable[..., SubsetSpec]) -> None:
    lines = '{"image_path": "b.jpg", "caption": "bee"}\n\n{"image_path": "a.png", "caption": "ay", "tags": "t"}\n'
    samples = scan(listed(lines, name="meta.jsonl"), 0).samples
    assert [(sample.key, sample.caption) for sample in samples] == [("0/a.png", "ay,t"), ("0/b.jpg", "bee")]


def test_what_is_odd_is_said(listed: Callable[..., SubsetSpec], caplog: pytest.LogCaptureFixture) -> None:
    summary = scan(listed({"a": {"caption": "one\ntwo"}, "b": {}}), 0).summary
    assert (summary.captions_found, summary.captions_missing, summary.captions_of_several_lines) == (1, 1, 1)
    assert "1 images have neither caption nor tags" in caplog.text
    assert "1 captions have more than one line: only the first is used" in caplog.text


MISTAKES = {
    "{": r"meta\.json, line 1: not valid JSON: ",
    "[]": r'meta\.json: is not of the form \{"image": ',
    '{"a.png": "a cat"}': r'meta\.json: is not of the form \{"image": ',
    "{}": r"subset 1: .*meta\.json lists no images",
    '{"a.png": {"tags": ["x", "y"]}}': r'meta\.json: a\.png: tags: \["x", "y"\] is not text in quotes',
    '{"a.png": {}, "x.png": {}, "y": {}}': r"subset 1: 2 of the 3 images that .* lists are not in .*:\n  x\.png\n  y$",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(listed: Callable[..., SubsetSpec], text: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[text]):
        scan(listed(text), 0)


def test_more_mistakes(tmp_path: Path, listed: Callable[..., SubsetSpec], subset: MakeSubset) -> None:
    with pytest.raises(UserError, match=r"meta\.jsonl, line 2: is not of the form"):
        scan(listed('{"image_path": "a.png"}\n{"caption": "b"}', name="meta.jsonl"), 0)
    with pytest.raises(UserError, match=r"meta\.jsonl, line 1: not valid JSON"):
        scan(listed("nonsense", name="meta.jsonl"), 0)
    with pytest.raises(UserError, match=r"subset 1: no such file: .*meta\.jso, did you mean '.*meta\.jsonl?'"):
        scan(subset(metadata_file=tmp_path / "meta.jso"), 0)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"could be a\.jpg or a\.png: give the extension"):
        scan(listed({"a": {}}), 0)
    (tmp_path / "latin.json").write_bytes('{"a.png": {"caption": "café"}}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json: not UTF-8 \(byte"):
        scan(subset(metadata_file=tmp_path / "latin.json"), 0)


def test_a_data_set_of_each_kind(tmp_path: Path, subset: MakeSubset, dataset: MakeDataset, train_images: Path) -> None:
    images = sorted(train_images.glob("b*.png"), key=lambda image: image.stem)[:3]
    folder = tmp_path / "folder"
    folder.mkdir()
    for image in images:
        shutil.copy(image, folder)
    (tmp_path / "m.json").write_text(json.dumps({image.stem: {"caption": image.stem} for image in images}))
    by_file = subset(metadata_file=tmp_path / "m.json", image_dir=train_images, num_repeats=2)
    prepared = prepare([dataset(subset(image_dir=folder, class_tokens="x")), dataset(by_file)], multiple_of=8)
    assert [sample.key for sample in prepared.samples] == [
        *(f"0/{image.name}" for image in images),
        *(f"1/{image.stem}" for image in images),
    ]
    assert [sample.caption for sample in prepared.samples] == ["x"] * 3 + [image.stem for image in images]
    assert [group.draws for group in prepared.groups] == [3, 6]
