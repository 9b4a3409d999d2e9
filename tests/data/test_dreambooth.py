"""Folders of images and captions, with all that goes wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.data.dataset_config import SubsetSpec
from library.data.samples import Sample
from library.data.sources.dreambooth import balance_regularisation, scan
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]


def touch(folder: Path, *names: str, **texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    for stem, text in texts.items():
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")


def captions(spec: SubsetSpec) -> dict[str, str]:
    return {sample.path.name: sample.caption for sample in scan(spec, 0).samples}


def test_images_sorted_with_their_captions(tmp_path: Path, subset: MakeSubset) -> None:
    touch(tmp_path, "b.png", "A.JPG", "c.webp", "notes.md", a="the a\n", b=" the b ", c="c")
    samples, summary = scan(subset(num_repeats=3), 7)
    assert [(s.path, s.key, s.caption, s.repeats) for s in samples] == [
        (tmp_path / "A.JPG", "7/A.JPG", "the a", 3),  # a.txt: letter case does not count
        (tmp_path / "b.png", "7/b.png", "the b", 3),
        (tmp_path / "c.webp", "7/c.webp", "c", 3),
    ]
    assert (summary.images, summary.captions_found, summary.captions_missing) == (3, 3, 0)


@pytest.mark.parametrize("extension", ["caption", ".caption", ".Caption"])
def test_caption_extension_with_or_without_dot(tmp_path: Path, subset: MakeSubset, extension: str) -> None:
    touch(tmp_path, "a.png", a="text")
    (tmp_path / "a.caption").write_text("caption", encoding="utf-8")
    assert captions(subset(caption_extension=extension)) == {"a.png": "caption"}


def test_first_line_only_byte_order_mark_and_line_ends(
    tmp_path: Path, subset: MakeSubset, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    (tmp_path / "b.txt").write_bytes(b"only\r\n\r\n  \r\n")
    (tmp_path / "c.txt").write_bytes("one\u2028line".encode())
    (tmp_path / "d.txt").write_bytes(b"\nlate")
    spec = subset()
    assert captions(spec) == {"a.png": "first", "b.png": "only", "c.png": "one\u2028line", "d.png": ""}
    summary = scan(spec, 0).summary
    assert (summary.captions_found, summary.captions_empty, summary.captions_of_several_lines) == (4, 1, 2)
    assert "2 caption files have more than one line" in caplog.text
    assert "1 caption files are empty" in caplog.text


def test_class_tokens_where_there_is_no_caption(
    tmp_path: Path, subset: MakeSubset, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "b.png", "empty.png", a="text", empty="")
    assert captions(subset(class_tokens="sks dog")) == {"a.png": "text", "b.png": "sks dog", "empty.png": ""}
    assert "1 images have no .txt file: their caption is 'sks dog' (such as b.png)" in caplog.text
    assert captions(subset())["b.png"] == ""
    assert "their caption is empty" in caplog.text
    summary = scan(subset(), 0).summary
    assert (summary.captions_found, summary.captions_missing, summary.captions_empty) == (2, 1, 1)


def test_no_caption_at_all_is_fine(tmp_path: Path, subset: MakeSubset) -> None:
    touch(tmp_path, "a.png", "readme.txt")
    assert captions(subset(caption_extension=".caption", class_tokens="cat")) == {"a.png": "cat"}


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        (".caption", ".txt"),
        (".txt", ".caption"),
        (".tags", ".txt"),
        (".text", ".txt"),
        ("tx", ".txt"),
        (".Cpation", ".caption"),
    ],
)
def test_captions_under_another_extension_are_an_error(
    tmp_path: Path, subset: MakeSubset, wanted: str, there: str
) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", f"a{there}", f"b{there}")
    with pytest.raises(UserError) as error:
        scan(subset(caption_extension=wanted), 0)
    for part in (
        f"none of 3 images has a .{wanted.lstrip('.')} file",
        f"2 have a {there}",
        f"--caption_extension {there}",
        "subset 1",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("wanted", [".none-use-foldername", "none", ".nocaption", ".xyz", ".off"])
def test_an_extension_that_no_captions_have_asks_for_the_folders_name(
    tmp_path: Path, subset: MakeSubset, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", "a.txt", "b.txt")
    assert captions(subset(caption_extension=wanted, class_tokens="cat")) == dict.fromkeys(
        ("a.png", "b.png", "c.png"), "cat"
    )
    assert (
        f"3 images have no .{wanted.lstrip('.')} file: their caption is 'cat'; "
        "2 .txt files lie beside them and are not read (such as a.png)"
    ) in caplog.text


def test_captions_that_are_not_utf8_are_named(tmp_path: Path, subset: MakeSubset) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 \(byte 3\)"):
        scan(subset(), 0)


def test_images_that_share_a_name_are_said(
    tmp_path: Path, subset: MakeSubset, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "a.jpg", "b.png", a="x", b="y")
    assert captions(subset()) == {"a.jpg": "x", "a.png": "x", "b.png": "y"}
    assert "2 images share their name" in caplog.text
    assert scan(subset(), 0).summary.shared_names == 2


def test_two_captions_that_differ_in_case_only(tmp_path: Path, subset: MakeSubset) -> None:
    touch(tmp_path, "a.png", "A.txt", "a.TXT")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system sees no letter case")
    with pytest.raises(UserError, match=r"'a\.txt' could be A\.txt or a\.TXT"):
        scan(subset(), 0)
    touch(tmp_path, a="exact")
    assert captions(subset()) == {"a.png": "exact"}


def test_a_face_detectors_box_in_the_name(tmp_path: Path, subset: MakeSubset) -> None:
    touch(tmp_path, "me_10_20_30_40.png", "me_too_20_30_40.png", "you_1_2_3_4.png", me="me", you_1_2_3_4="you")
    assert captions(subset()) == {"me_10_20_30_40.png": "me", "me_too_20_30_40.png": "", "you_1_2_3_4.png": "you"}


def test_missing_folder_names_the_nearest(tmp_path: Path, subset: MakeSubset) -> None:
    (tmp_path / "pictures" / "10_cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"subset 1: no such folder: .*10_cats, did you mean '.*10_cat'\?"):
        scan(subset(image_dir=tmp_path / "pictures" / "10_cats"), 0)
    with pytest.raises(UserError, match=r"did you mean '.*pictures'"):
        scan(subset(image_dir=tmp_path / "picture" / "10_cat"), 0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no such folder"):
        scan(subset(image_dir=tmp_path / "file"), 0)


def test_empty_folder_points_to_the_subfolder(tmp_path: Path, subset: MakeSubset) -> None:
    with pytest.raises(UserError, match="holds no images"):
        scan(subset(), 0)
    touch(tmp_path / "inner", "a.png")
    with pytest.raises(UserError, match="its sub-folder 'inner' does"):
        scan(subset(), 0)


def test_what_is_left_out_is_said(tmp_path: Path, subset: MakeSubset, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.png", "b.tif", "c.gif", "._a.png", a="x")
    touch(tmp_path / "inner", "d.png")
    touch(tmp_path / "texts", "d.txt")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    samples, summary = scan(subset(), 0)
    assert [sample.path.name for sample in samples] == ["a.png", "gone.png", "self.png"]  # the check reports the links
    assert (summary.other_image_files, summary.subfolders_with_images) == (2, 2)  # inner and loop
    assert "2 files of other image formats are left out (such as b.tif)" in caplog.text
    assert "2 sub-folders with images are not searched (such as inner)" in caplog.text


def test_quickstart_folder_is_clean(train_images: Path, subset: MakeSubset, caplog: pytest.LogCaptureFixture) -> None:
    samples, summary = scan(subset(image_dir=train_images), 0)
    assert len(samples) == summary.captions_found == 160
    assert not caplog.text
    assert all(sample.caption for sample in samples)


def samples_of(subset: MakeSubset, *, train: list[int], reg: list[int]) -> list[Sample]:
    """Samples with these repeats."""
    both = [(False, repeats) for repeats in train] + [(True, repeats) for repeats in reg]
    return [
        Sample(Path(f"{i}.png"), f"0/{i}.png", "", subset(is_reg=is_reg), (8, 8), repeats)
        for i, (is_reg, repeats) in enumerate(both)
    ]


def kohya_reg_repeats(train_total: int, reg: list[int]) -> list[int]:
    """The rule of sd-scripts v0.10, DreamBoothDataset.__init__, step by step."""
    result: list[int] = []
    total, first_round = 0, True
    while total < train_total:
        for i, repeats in enumerate(reg):
            if first_round:
                result.append(repeats)
                total += repeats
            else:
                result[i] += 1
                total += 1
            if total >= train_total:
                break
        first_round = False
    return result


@pytest.mark.parametrize(
    ("train", "reg"),
    [([10], [1, 1, 1]), ([5, 5], [3, 3, 3, 3, 3]), ([4], [1, 1, 1, 1]), ([3], [7, 1]), ([100], [2, 3]), ([2], [])],
)
def test_regularisation_images_are_balanced_as_kohya_does(subset: MakeSubset, train: list[int], reg: list[int]) -> None:
    balanced = balance_regularisation(samples_of(subset, train=train, reg=reg))
    assert [s.repeats for s in balanced if not s.subset.is_reg] == train
    assert [s.repeats for s in balanced if s.subset.is_reg] == (kohya_reg_repeats(sum(train), reg) if reg else [])
