"""Each check finds what it is for, and nothing in good data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.config.data.dataset_config import SubsetSpec
from library.data.buckets import Placement
from library.data.quality import blur, duplicates, sizes, texts, words
from library.data.quality.check import check, verdict
from library.data.quality.folder import Check, Data, Finding, Folder, Level, Picture
from library.data.quality.look import UNIT, Look
from library.data.quality.statistics import effective_number

Make = Callable[..., Folder]
GOOD = "abcd, a fox and {}"


def look(*, seed: int, blur: float = 0.3, near: np.ndarray | None = None) -> Look:
    """A signature that is unlike all others, or close to `near`."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=192) if near is None else near + 0.02 * UNIT / 192**0.5 * rng.normal(size=192)
    return Look(np.rint(UNIT * values / np.linalg.norm(values)).astype(np.int16), blur)


def picture(number: int, **changes: object) -> Picture:
    one = Picture(
        path=Path(f"fox-{chr(97 + number)}.png"),
        text=GOOD.format(f"thing {number}"),
        captioned=True,
        size=(512, 512),
        placement=Placement((512, 512), (512, 512)),
        look=look(seed=number),
        content=f"content {number}",
        held_out=False,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(subset: Callable[..., SubsetSpec]) -> Make:
    def make(*pictures: Picture, good: int = 10, **changes: object) -> Folder:
        own = subset(**changes)
        return Folder(own, own.source, (*map(picture, range(good)), *pictures))

    return make


def found_by(check: Check, folder: Folder) -> list[Finding]:
    """The findings of one check in a folder that is alone. A word is a token, and 75 are read."""
    return list(check(folder, Data(folder.pictures, {}, lambda text: len(text.split()), 75)))


def by_name(found: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}  # type: ignore[attr-defined]


def files(finding: Finding) -> list[str]:
    return [item.path.name for item in finding.items]


def all_of(folder: Folder) -> dict[str, Finding]:
    (one,) = check([folder], count_tokens=lambda text: len(text.split()), token_limit=75)
    return by_name(one.findings)


def test_good_data_has_no_flaw(folder: Make) -> None:
    assert all_of(folder()) == {}
    assert verdict(check([folder()], count_tokens=len, token_limit=999)).startswith("nothing stands against")


def test_sizes(folder: Make) -> None:
    data = folder(
        picture(20, size=(100, 128), placement=Placement((512, 640), (512, 655))),
        picture(21, size=(400, 500), placement=Placement((512, 640), (512, 640))),
        picture(22, size=(20, 700), placement=None),
        picture(23, size=(511, 512), placement=Placement((512, 512), (512, 513))),  # by rounding alone
    )
    found = by_name(found_by(sizes.check, data))
    assert files(found["enlarged much"]) == ["fox-u.png"]
    assert found["enlarged much"].items[0].detail == "100 × 128 to 512 × 655, 5.12 times"
    assert files(found["enlarged"]) == ["fox-v.png"]
    assert "up to 1.28 times" in found["enlarged"].text
    assert files(found["too small for a bucket"]) == ["fox-w.png"]
    assert found["too small for a bucket"].level is Level.MUST


def test_blur_lists_the_worst_first(folder: Make) -> None:
    data = folder(picture(20, look=look(seed=20, blur=0.5)), picture(21, look=look(seed=21, blur=1.0)))
    (found,) = found_by(blur.check, data)
    assert [(item.path.name, item.detail) for item in found.items] == [
        ("fox-v.png", "one colour"),
        ("fox-u.png", "blur 0.50"),
    ]


def test_near_duplicates_and_what_validation_knows(folder: Make) -> None:
    first = look(seed=0).signature.astype(float)
    data = folder(
        picture(20, look=look(seed=20, near=first)),
        picture(21, look=look(seed=21, near=first), held_out=True),
        picture(22, content="content 5"),  # the same pixels, so the looks do not matter
        picture(23, held_out=True),
    )
    found = all_of(data)
    finding = found["near-duplicates"]
    assert [(item.path.name, item.group) for item in finding.items] == [
        *(("fox-a.png", 1), ("fox-u.png", 1), ("fox-v.png", 1)),
        *(("fox-f.png", 2), ("fox-w.png", 2)),
    ]
    assert finding.text == "3 of 14 images are nearly the same as another one (2 groups)"
    assert files(found["validation knows training"]) == ["fox-v.png"]
    assert found["validation knows training"].text.startswith("1 of 2 held-out images")


def test_copies_in_another_folder_do_not_count_twice(folder: Make, tmp_path: Path) -> None:
    """Two data sets of one folder, as for two resolutions, have each file twice."""
    done = check([folder(), folder()], count_tokens=len, token_limit=999)
    assert [one.findings for one in done] == [()]  # and the folder is listed once
    other = folder(picture(30, content="content 3", held_out=True), good=0)
    *_, last = check([folder(), other], count_tokens=len, token_limit=999)
    assert last.findings[0].items[0].detail == "as fox-d.png"


def test_series_are_numbered_and_alike(folder: Make) -> None:
    rng = np.random.default_rng(5)
    start, step = rng.normal(size=192), rng.normal(size=192)

    def shot(number: int, share: float) -> Picture:
        values = start + share * step
        signature = np.rint(UNIT * values / np.linalg.norm(values)).astype(np.int16)
        return picture(number, path=Path(f"shot-{number:04d}.png"), look=Look(signature, 0.3))

    shots = [shot(number, 0.3 * number) for number in range(4)]
    found = all_of(folder(*shots, shot(9, 1.2), good=3))
    assert files(found["series"]) == [f"shot-000{number}.png" for number in range(4)]
    assert found["series"].level is Level.NOTE
    # numbered, but not alike
    unlike = [picture(number, path=Path(f"shot-{number}.png")) for number in range(6)]
    assert all_of(folder(*unlike, good=0)) == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "caption empty"),
        ("  ", "caption empty"),
        *(
            (text, "placeholder")
            for text in ("TODO", "todo.", "Caption here", "[insert caption]", "...", "n/a", "IMG_0012")
        ),
        *((text, "placeholder") for text in ("a cat, TODO: colour", "Lorem ipsum dolor sit amet", "add a description")),
        ("a fox", "caption short"),
        ("a cafÃ© with a fox in front of it", "other encoding"),
        ("a caf� with a fox in front of it", "other encoding"),
        ("fox " * 80, "caption cut"),
    ],
)
def test_captions_that_say_nothing(folder: Make, text: str, name: str) -> None:
    found = by_name(found_by(texts.check, folder(picture(20, text=text))))
    assert list(found) == [name]
    assert files(found[name]) == ["fox-u.png"]
    assert found[name].text.startswith("1 of 11 ")


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a café, a tea room",
        "ein Bär im Schnee",
        "雪の中の狐の絵です、とても美しい",
        "method acting test shot, a fox",
        "todo el bosque en invierno",
    ],
)
def test_captions_that_are_fine(folder: Make, text: str) -> None:
    assert not (found_by(texts.check, folder(picture(20, text=text))))


def test_class_tokens_are_no_captions(folder: Make) -> None:
    """Neither short nor shared: they were not written for an image. Regularisation images may have none at all."""
    plain = [picture(number, text="fox", captioned=False) for number in range(5)]
    assert all_of(folder(*plain, good=0)) == {}
    empty = [replace(one, text="") for one in plain]
    found = all_of(folder(*empty, good=0))
    assert list(found) == ["caption empty"]
    assert found["caption empty"].items[0].detail == "no caption file"
    assert all_of(folder(*empty, good=0, is_reg=True)) == {}


def test_one_caption_on_many_images(folder: Make) -> None:
    shared = [
        picture(number, text=f"abcd,  a {word} in the snow") for number, word in enumerate(("fox", "Fox", "FOX"), 20)
    ]
    twice = [picture(number, text="abcd, a bear in the snow") for number in (23, 24)]
    (found,) = found_by(texts.check, folder(*shared, *twice))
    assert found.name == "one caption, many images"
    assert files(found) == ["fox-u.png", "fox-v.png", "fox-w.png"]


def test_the_trigger_word_is_the_one_that_most_captions_begin_with(folder: Make) -> None:
    found = by_name(found_by(words.check, folder(picture(20, text="a bear, in the woods, at night"))))
    assert list(found) == ["trigger word missing"]
    assert found["trigger word missing"].text == "'abcd', with which most captions begin, is missing in 1 of 11"
    sentences = [picture(number, text=f"Abcd sits on chair {number}.") for number in range(9)]
    found = by_name(found_by(words.check, folder(*sentences, picture(20, text="It sits on a chair."), good=0)))
    assert files(found["trigger word missing"]) == ["fox-u.png"]
    behind = folder(picture(20, text="a bear, in the woods, with abcd"))
    assert not (found_by(words.check, behind)), "anywhere in the caption is enough"


@pytest.mark.parametrize("start", ["a", "The", "1girl,", "photo of", "2boys,", "this is"])
def test_usual_beginnings_are_no_trigger_word(folder: Make, start: str) -> None:
    usual = [picture(number, text=f"{start} thing {number} by number {number}") for number in range(9)]
    assert not (found_by(words.check, folder(*usual, picture(20, text="other words of mine"), good=0)))


def test_tags_and_sentences(folder: Make) -> None:
    tags = [picture(number, text=f"abcd, fox, snow, tag {number}") for number in range(10)]
    mixed = folder(*tags, picture(20, text="abcd, here a fox that is sitting in the snow looks to the left."), good=0)
    found = by_name(found_by(words.check, mixed))
    assert files(found["tags and sentences"]) == ["fox-u.png"]
    assert "10 captions are lists of tags and 1 are sentences" in found["tags and sentences"].text
    assert "tags and sentences" not in by_name(found_by(words.check, folder(*tags, good=0)))


def test_constant_and_rare_tags(folder: Make) -> None:
    tags = [picture(number, text=f"abcd, fox, snow, {'day' if number % 2 else 'night'}") for number in range(10)]
    data = folder(*tags[:-1], picture(20, text="abcd, fox, snow, nihgt"), good=0)
    found = by_name(found_by(words.check, data))
    assert found["constant tags"].text == "3 tags are in every caption: abcd, fox, snow"
    assert found["rare tags"].text == "1 of 6 tags are on one image alone: nihgt"
    assert list(words.tag_counts(data).items())[:4] == [("abcd", 10), ("fox", 10), ("snow", 10), ("night", 5)]


def test_effective_numbers() -> None:
    assert effective_number("") == 0
    assert effective_number("aaaa") == 1
    assert effective_number("abcd" * 3) == pytest.approx(4)
    assert effective_number("aab") == pytest.approx(3 / 2 ** (2 / 3))  # exp(H), H = log 3 - 2/3 log 2


def test_diversity_counts_near_duplicates_once(folder: Make) -> None:
    copies = [picture(number, content="content 0") for number in range(20, 30)]
    (one,) = check([folder(*copies)], count_tokens=len, token_limit=999)
    keys = [*"b" * 11, *range(9)]
    assert one.different_images == pytest.approx(effective_number(keys) / 20)
    assert one.different_captions == pytest.approx(1)


def test_the_verdict_names_the_worst_first(folder: Make) -> None:
    data = folder(*(picture(number, look=look(seed=number, blur=0.7)) for number in (20, 21)), picture(22, text="TODO"))
    text = verdict(check([data], count_tokens=len, token_limit=999))
    assert text.startswith(f"first, in {data.source}: 1 of 13 captions are placeholders. Write the captions")
    assert text.endswith(". Then 2 more findings")
    notes = folder(picture(20, text="a fox"), good=3)
    assert verdict(check([notes], count_tokens=len, token_limit=999)).endswith("the notes are worth a look")


def test_unreadable_files_come_first(folder: Make) -> None:
    data = replace(folder(picture(22, text="TODO")), faults={Path("x.txt"): "not UTF-8 (byte 3)"})
    (one,) = check([data], count_tokens=len, token_limit=999)
    assert [finding.name for finding in one.findings][:2] == ["unreadable", "placeholder"]


def test_nothing_at_all(folder: Make) -> None:
    (one,) = check([folder(good=0)], count_tokens=len, token_limit=75)
    assert (one.findings, one.different_images, one.different_tags) == ((), 1.0, 0.0)
    assert duplicates.near_duplicates([]) == {}
