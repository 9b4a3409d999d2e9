"""Names in composed and in decomposed Unicode, which look alike and are two names on most disks."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.config.data.dataset_config import SubsetSpec, load_datasets
from library.config.parser import parse
from library.data.sources import dreambooth, metadata
from library.data.sources.masks import find_masks
from library.errors import UserError, nearest_path
from library.paths import on_disk

REQUIRED = ("--pretrained_model_name_or_path", "x", "--output_dir", "out")
MakeSubset = Callable[..., SubsetSpec]


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


NAMES = ("élan", "über", "한국", "が")
BOTH_WAYS = pytest.mark.parametrize("there", [decomposed, str], ids=["decomposed on disk", "composed on disk"])


@pytest.fixture(autouse=True)
def two_forms(tmp_path: Path) -> None:
    """Some file systems (HFS+) take both for one name, and have no such fault."""
    (tmp_path / "é").touch()
    if (tmp_path / decomposed("é")).exists():
        pytest.skip("this file system sees no difference")
    (tmp_path / "é").unlink()


def other(form: Callable[[str], str]) -> Callable[[str], str]:
    return str if form is decomposed else decomposed


@BOTH_WAYS
def test_captions_are_found(tmp_path: Path, subset: MakeSubset, there: Callable[[str], str]) -> None:
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{there(name)}.png")
        (tmp_path / f"{other(there)(name)}.txt").write_text(name, encoding="utf-8")
    found = dreambooth.scan(subset(), 0)
    assert sorted(sample.caption for sample in found.samples) == sorted(NAMES)
    assert found.summary.captions_missing == 0


def test_a_caption_of_the_very_name_goes_first(tmp_path: Path, subset: MakeSubset, caplog: object) -> None:
    for name in ("é", decomposed("é")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(ascii(name), encoding="utf-8")
    found = dreambooth.scan(subset(), 0)
    assert {sample.path.stem: sample.caption for sample in found.samples} == {
        name: ascii(name) for name in ("é", decomposed("é"))
    }
    (tmp_path / f"{decomposed('É')}.png").touch()
    with pytest.raises(UserError, match=r"could be 'e\\u0301\.txt' or '\\xe9\.txt': keep one"):
        dreambooth.scan(subset(), 0)


@BOTH_WAYS
def test_masks_are_found(tmp_path: Path, subset: MakeSubset, there: Callable[[str], str]) -> None:
    (tmp_path / "masks").mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{there(name)}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "masks" / f"{other(there)(name)}.png")
    spec = replace(subset(), conditioning_data_dir=str(tmp_path / "masks"))
    masked = find_masks(dreambooth.scan(spec, 0).samples)
    assert all(sample.mask is not None and sample.mask.is_file() for sample in masked)
    assert len({sample.mask for sample in masked}) == len(NAMES)
    shutil.copy(tmp_path / "masks" / f"{other(there)('é')}lan.png", tmp_path / "masks" / f"{there('é')}lan.png")
    with pytest.raises(UserError, match=r"has two masks: 'e\\u0301lan\.png' and '\\xe9lan\.png'"):
        find_masks(dreambooth.scan(spec, 0).samples)


@BOTH_WAYS
@pytest.mark.parametrize("ending", [".png", ""])
def test_images_of_a_metadata_file_are_found(
    tmp_path: Path, subset: MakeSubset, there: Callable[[str], str], ending: str
) -> None:
    folder = tmp_path / there("été")
    folder.mkdir()
    entries = {}
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(folder / f"{there(name)}.png")
        entries[other(there)(f"été/{name}{ending}")] = {"caption": name}
    (tmp_path / "m.json").write_text(json.dumps(entries), encoding="utf-8")
    found = metadata.scan(subset(metadata_file=tmp_path / "m.json"), 0).samples
    assert sorted(sample.caption for sample in found) == sorted(NAMES)
    assert all(sample.path.is_file() for sample in found)


@BOTH_WAYS
def test_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: Callable[[str], str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("été/2_café", "été/validé", "été/masqué"):
        Path(there(name)).mkdir(parents=True)
    Path(there("été/listé.json")).touch()
    given = other(there)
    table = {name: given(f"été/{path}") for name, path in (
        ("image_dir", "2_café"), ("validation_dir", "validé"), ("conditioning_data_dir", "masqué")
    )}  # fmt: skip
    content = {"datasets": [{"resolution": 64, "subsets": [table, {"metadata_file": given("été/listé.json")}]}]}
    content["datasets"].append({"resolution": 64, "subsets": [content["datasets"][0]["subsets"].pop()]})
    Path("d.json").write_text(json.dumps(content), encoding="utf-8")
    first, second = (dataset.subsets[0] for dataset in load_datasets(parse([*REQUIRED, "--dataset_config", "d.json"])))
    places = (first.image_dir, first.validation_dir, first.conditioning_data_dir, second.metadata_file)
    assert all(Path(place).exists() for place in places if place is not None)
    assert None not in places
    by_words = load_datasets(parse([*REQUIRED, "--train_data_dir", given("été"), "--resolution", "64"]))[0].subsets
    assert [subset.image_dir for subset in by_words] == [Path(there("été/2_café"))]


def test_two_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert on_disk(tmp_path / "nothing" / "é") == tmp_path / "nothing" / "é"
    three = ("ệ", decomposed("ệ"), "ệ")
    for name in three[1:]:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"could be '.*\\u.*' or '.*\\u.*': keep one of them"):
        on_disk(tmp_path / three[0])


def test_the_nearest_name_says_that_it_looks_alike(tmp_path: Path) -> None:
    (tmp_path / decomposed("été")).mkdir()
    hint = f", did you mean '{tmp_path / decomposed('été')}'?"
    assert nearest_path(tmp_path / "étés") == hint
    assert nearest_path(tmp_path / "été") == f"{hint} It differs only in how accents are stored: copy it from there."
