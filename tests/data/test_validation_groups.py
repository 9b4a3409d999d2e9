"""--validation_group: whole groups are held out, or none of their images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.config.fields import BadValue
from library.config.options.validation import read_group
from library.data.prepare import inspect, prepare
from library.data.prepared import Prepared
from library.data.validation_groups import date_taken
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]


def write(path: Path, seed: int, *, taken: str = "", changed: str = "") -> None:
    """A picture unlike those of other seeds, with a caption. `taken`: its date in EXIF; `changed`: that of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    image.save(path, exif=exif)
    path.with_suffix(".txt").write_text(f"picture {seed}\n", encoding="utf-8")
    if changed:
        time = np.datetime64(changed, "s").astype(int)
        os.utime(path, (time, time))


def names(samples: Prepared | None) -> set[str]:
    assert samples is not None
    return {sample.path.name for sample in samples.samples}


@pytest.fixture
def by_name(tmp_path: Path) -> Path:
    """Five places with four views each: den-0.png ... den-3.png, …"""
    for place, name in enumerate(("den", "bay", "inn", "spa", "zoo")):
        for view in range(4):
            write(tmp_path / "views" / f"{name}-{view}.png", 10 * place + view)
    return tmp_path / "views"


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_by_name(by_name: Path, subset: MakeSubset, dataset: MakeDataset, share: float) -> None:
    spec = dataset(subset(image_dir=by_name, validation_split=share))
    chosen = set()
    for seed in range(8):
        prepared = prepare([spec], multiple_of=8, seed=seed, validation_group="name:^([a-z]+)-")
        held, trained = names(prepared.validation), names(prepared)
        places = {name[:3] for name in held}
        assert len(held) == 20 * share
        assert len(places) == 5 * share
        assert not places & {name[:3] for name in trained}
        chosen.add(frozenset(places))
    assert len(chosen) > 2, "the seed decides which"


def test_the_choice_depends_on_contents_not_on_names(
    by_name: Path, tmp_path: Path, subset: MakeSubset, dataset: MakeDataset
) -> None:
    other = tmp_path / "renamed"
    other.mkdir()
    new = {"den": "m", "bay": "z", "inn": "b", "spa": "a", "zoo": "k"}
    for path in by_name.iterdir():
        place, rest = path.name.split("-")
        shutil.copy(path, other / f"{new[place]}-{rest}")
    keys = [
        [
            sample.key
            for sample in prepare(
                [dataset(subset(image_dir=folder, validation_split=0.2))],
                multiple_of=8,
                validation_group="name:^([a-z]+)-",
            ).validation.samples  # type: ignore[union-attr]
        ]
        for folder in (by_name, other)
    ]
    assert keys[0] == keys[1]


def test_names_that_do_not_match_stand_alone(
    by_name: Path, subset: MakeSubset, dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataset(subset(image_dir=by_name, validation_split=0.2))
    prepared = prepare([spec], multiple_of=8, validation_group="name:(den)")
    assert len(names(prepared.validation)) == 4
    assert len({name for name in names(prepared.validation) if name.startswith("den")}) in (0, 4)
    assert "16 of 20 names do not match it, and are groups of their own (such as bay-0.png)" in caplog.text
    with pytest.raises(UserError, match=r"--validation_group name:\(x\): no image's name matches it, such as bay-0"):
        prepare([spec], multiple_of=8, validation_group="name:(x)")


def test_by_folder(tmp_path: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    """Whole folders, also those of two data sets; a copy in another folder joins the two."""
    folders = [tmp_path / str(number) for number in range(6)]
    for number, folder in enumerate(folders):
        for image in range(3):
            write(folder / f"{number}{image}.png", 10 * number + image)
    parts = [subset(image_dir=folder, validation_split=1 / 3) for folder in folders]
    specs = [dataset(*parts[:3]), dataset(*parts[3:])]
    prepared = prepare(specs, multiple_of=8, seed=2, validation_group="folder")
    held = {name[0] for name in names(prepared.validation)}
    assert len(held) == 2
    assert not held & {name[0] for name in names(prepared)}
    write(folders[1] / "copy.png", 0)
    for seed in range(6):
        prepared = prepare(specs, multiple_of=8, seed=seed, validation_group="folder")
        trained = {sample.path.parent.name for sample in prepared.samples}
        assert len(trained & {"0", "1"}) in (0, 2), "they share a picture"


def test_dates(tmp_path: Path, subset: MakeSubset, dataset: MakeDataset, caplog: pytest.LogCaptureFixture) -> None:
    """EXIF's date goes before the file's. `latest` holds out the newest days, `date` any."""
    folder = tmp_path / "days"
    for day in range(1, 6):
        for shot in range(4):
            camera = f"2026:03:{day:02d} 1{shot}:00:00" if shot < 3 else ""
            write(folder / f"{day}{shot}.jpg", 10 * day + shot, taken=camera, changed=f"2026-03-0{day}T12:00")
            if camera:
                os.utime(folder / f"{day}{shot}.jpg", (0, 0))
    assert date_taken(folder / "10.jpg") == "2026-03-01"
    assert date_taken(folder / "13.jpg") is None
    spec = dataset(subset(image_dir=folder, validation_split=0.2))
    for seed in (0, 1):
        prepared = prepare([spec], multiple_of=8, seed=seed, validation_group="latest")
        assert names(prepared.validation) == {f"5{shot}.jpg" for shot in range(4)}
    assert "5 of 20 images have no date in EXIF: that of their file is taken" in caplog.text
    days = set()
    for seed in range(6):
        prepared = prepare([spec], multiple_of=8, seed=seed, validation_group="date")
        held = {name[0] for name in names(prepared.validation)}
        assert len(held) == 1
        assert len(names(prepared.validation)) == 4
        days |= held
    assert len(days) > 1
    small = dataset(subset(image_dir=folder, validation_split=0.05))
    with pytest.raises(
        UserError, match=r"the newest date, 2026-03-05, has 4 of 20 images, and validation_split asks for"
    ):
        prepare([small], multiple_of=8, validation_group="latest")


def test_near_duplicates(tmp_path: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    """Also those of a folder for validation are not trained."""
    for number in range(10):
        path = tmp_path / "all" / f"{number}a.png"
        write(path, number)
        with Image.open(path) as image:
            image.resize((48, 48), Image.Resampling.BILINEAR).save(path.with_name(f"{number}b.jpg"), quality=70)
        (path.with_name(f"{number}b.txt")).write_text("again\n", encoding="utf-8")
    part = subset(image_dir=tmp_path / "all", validation_split=0.2)
    for seed in range(4):
        prepared = prepare([dataset(part)], multiple_of=8, seed=seed, validation_group="near")
        assert len(names(prepared.validation)) == 4
        assert not {name[0] for name in names(prepared.validation)} & {name[0] for name in names(prepared)}
        seen = inspect([dataset(part)], multiple_of=8, seed=seed, validation_group="near")
        held = {picture.path.name for folder in seen for picture in folder.pictures if picture.held_out}
        assert held == names(prepared.validation)
    (tmp_path / "apart").mkdir()
    for name in ("3a.png", "3a.txt"):
        shutil.move(tmp_path / "all" / name, tmp_path / "apart" / name)
    beside = subset(image_dir=tmp_path / "all", validation_dir=str(tmp_path / "apart"))
    assert "3b.jpg" in names(prepare([dataset(beside)], multiple_of=8))
    prepared = prepare([dataset(beside)], multiple_of=8, validation_group="near")
    assert "3b.jpg" not in names(prepared)
    assert len(names(prepared)) == 18


def test_what_cannot_be_split(by_name: Path, tmp_path: Path, subset: MakeSubset, dataset: MakeDataset) -> None:
    def spec(**changes: object) -> list[DatasetSpec]:
        return [dataset(subset(image_dir=by_name, **{"validation_split": 0.2, **changes}))]

    with pytest.raises(UserError, match=r"all 20 images are one group \(.*views\): holding it out would leave nothing"):
        prepare(spec(), multiple_of=8, validation_group="folder")
    with pytest.raises(UserError, match=r"the smallest group has 4 of 20 images, .* asks for 2; with more than 0.100"):
        prepare(spec(validation_split=0.1), multiple_of=8, validation_group="name:^([a-z]+)")
    assert prepare(spec(validation_split=0.13), multiple_of=8, validation_group="name:^([a-z]+)").validation is not None
    with pytest.raises(UserError, match=r"validation_split of 20 images is none: at least 0.026"):
        prepare(spec(validation_split=0.01), multiple_of=8, validation_group="near")
    write(tmp_path / "more" / "a.png", 99)
    seeds = dataset(
        subset(image_dir=by_name, validation_split=0.2, validation_seed=1),
        subset(image_dir=tmp_path / "more", validation_split=0.2, validation_seed=2),
    )
    with pytest.raises(UserError, match="give all subsets the same validation_seed"):
        prepare([seeds], multiple_of=8, validation_group="near")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("folders", "did you mean 'folder'?"),
        ("name:([a-z]", "no regular expression"),
        ("name:abc", "has no group"),
        ("name:", "has no group"),
    ],
)
def test_wrong_words(word: str, message: str) -> None:
    with pytest.raises(BadValue, match=message.replace("?", r"\?")):
        read_group(word)
