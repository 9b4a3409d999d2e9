"""--check_data from the command line: what it prints and writes, and that it changes nothing."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from library.record import run_file
from library.record.facts import Flaw
from library.record.summary import flaw_rows, rows
from tests.conftest import IMAGES

Train = Callable[..., int]


class Text(HTMLParser):
    """The words of a page, and the sources of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attributes)["src"] or "")

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def flawed(image_folder: Path) -> Path:
    """The six images of `image_folder` and more, with flaws."""
    folder = image_folder / "2_style"
    first, second = sorted(folder.glob("*.png"))[:2]
    with Image.open(first) as image:
        image.resize((40, 40)).save(folder / "version.webp", quality=90)
    with Image.open(second) as image:
        image.convert("RGB").filter(ImageFilter.GaussianBlur(3)).save(folder / "blur<b>red.png")
    (folder / "broken.png").write_bytes(b"no image at all")
    for name, text in (
        ("version", "TODO"),
        ("blur<b>red", "emoji of a <script>alert(1)</script> thing"),
        ("broken", "x y"),
    ):
        (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    third = sorted((IMAGES / "validation").glob("*.png"))[0]
    shutil.copy(third, folder / "latin.png")
    (folder / "latin.txt").write_bytes("emoji of a caf\xe9, food and drink".encode("latin-1"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_names_every_flaw_and_changes_nothing(
    train: Train, flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(flawed)
    assert train("--check_data", "--max_train_steps", "999") == 0
    assert contents(flawed) == before
    (page,) = (tmp_path / "out").iterdir()
    assert page.name == "test-data.html"
    said = capsys.readouterr().out
    for line in (
        f"{flawed}: 9 images, captions of ",
        "to fix      unreadable: 2 files cannot be read",
        "broken.png (not an image, it begins with 'no image at all')",
        "latin.txt (not UTF-8 (byte 14): save it in that encoding)",
        "to fix      placeholder: 1 of 9 captions are placeholders",
        "to look at  blurred: 1 of 9 images are blurred",
        "to look at  near-duplicates: 1 of 9 images are nearly the same as another one (1 group)",
        "to know     enlarged: 1 of 9 images are enlarged, up to 1.60 times",
        f"verdict: first, in {flawed}: 2 files cannot be read. Training stops there",
        f"written: {page}. Nothing was trained",
    ):
        assert line in said
    read = Text(page.read_text(encoding="utf-8"))
    assert "1 of 9 captions are placeholders" in read.text
    assert "blur<b>red.png" in read.text
    assert "<script>" not in page.read_text(encoding="utf-8")
    assert len(read.pictures) >= 6
    assert all(source.startswith("data:image/webp;base64,") for source in read.pictures)


def test_the_list_has_every_file(train: Train, flawed: Path, tmp_path: Path) -> None:
    for number in range(12):
        (flawed / f"many{number}.txt").write_text("TODO", encoding="utf-8")
        Image.effect_noise((64, 64), 50 + 10 * number).convert("RGB").save(flawed / f"many{number}.png")
    assert train("--check_data=list") == 0
    with (tmp_path / "out" / "test-data.tsv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t"))
    todo = [row["file"] for row in found if row["finding"] == "placeholder"]
    assert sorted(todo) == sorted(
        str(flawed / f"{name}") for name in ("version.webp", *(f"many{n}.png" for n in range(12)))
    )
    assert {row["level"] for row in found} <= {"to fix", "to look at", "to know"}
    near = [(row["group"], Path(row["file"]).name) for row in found if row["finding"] == "near-duplicates"]
    assert ("1", "version.webp") in near


def test_data_that_is_fine(train: Train, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--check_data") == 0
    said = capsys.readouterr().out
    assert "no flaw was found" in said
    assert "verdict: nothing stands against training on this data" in said


def test_a_folder_of_two_data_sets_is_listed_once(
    train: Train, flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is the same in both is one finding; what depends on their settings names these."""
    config = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{flawed.as_posix()}'\ncaption_extension = '.txt'\nnum_repeats = "
    sizes = ("resolution = 64\nbatch_size = 1", "resolution = 128\nbatch_size = 3")
    config.write_text("".join(f"[[datasets]]\n{size}\n{subset}{n}\n" for n, size in enumerate(sizes, 1)))
    assert train("--check_data=list", "--train_data_dir=", "--dataset_config", str(config)) == 0
    said = capsys.readouterr().out
    both = ["resolution 64 × 64, batch_size 1, num_repeats 1", "resolution 128 × 128, batch_size 3, num_repeats 2"]
    for line in (
        f"  in 2 data sets: {'; '.join(both)}\n",
        "to fix      placeholder: 1 of 9 captions are placeholders\n",
        f"enlarged: 1 of 9 images are enlarged, up to 1.60 times (with {both[0]})\n",
        f"enlarged much: 9 of 9 images are enlarged 2 times or more, up to 3.2 times (with {both[1]})\n",
    ):
        assert said.count(line) == 1
    assert said.count(f"{flawed}: 9 images") == 1
    with (tmp_path / "out" / "test-data.tsv").open(encoding="utf-8", newline="") as file:
        found = [row["finding"] for row in csv.DictReader(file, delimiter="\t")]
    assert found.count("placeholder") == 1
    page = Text((tmp_path / "out" / "test-data.html").read_text(encoding="utf-8")).text
    assert "9 images. Nothing was trained" in page
    assert both[1] in page


def test_what_training_refuses_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--check_data", "--train_data_dir", str(tmp_path / "gone")) == 2
    assert train("--check_data", "--dry_run") == 2
    assert "--dry_run and --check_data: give one of them" in capsys.readouterr().err
    assert train("--check_data=lists") == 2
    assert "'lists' is not one of page, list, did you mean 'list'?" in capsys.readouterr().err


def test_images_without_a_bucket_are_named(train: Train, flawed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training stops at the first of them."""
    Image.effect_noise((9, 64), 90).convert("RGB").save(flawed / "narrow.png")
    words = ("--enable_bucket", "--bucket_no_upscale", "--bucket_reso_steps", "16")
    assert train("--check_data", *words) == 0
    assert "too small for a bucket: 1 of 10 images" in capsys.readouterr().out
    for name in ("broken.png", "latin.txt"):
        (flawed / name).unlink()
    assert train(*words) == 2


def test_a_run_has_the_flaws_in_its_record_and_report(
    train: Train, flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken.png", "latin.txt"):
        (flawed / name).unlink()
    assert train("--report", "--max_train_steps", "1") == 0
    record = run_file.read(tmp_path / "out" / "test-run.json")
    assert record is not None
    assert record.facts is not None
    flaws = {flaw.name: flaw for flaw in record.facts.flaws}
    assert {"placeholder", "blurred", "near-duplicates", "enlarged"} <= set(flaws)
    assert (flaws["placeholder"].files, flaws["placeholder"].count) == (("version.webp",), 1)
    said = [text for label, text in rows(record.facts) if label == "data check"]
    assert said == [f"{flawed}: 1 of 9 captions are placeholders (version.webp)"]
    assert "--check_data shows everything, with pictures" in capsys.readouterr().err
    page = Text((tmp_path / "out" / "test-report.html").read_text(encoding="utf-8")).text
    assert "1 of 9 captions are placeholders" in page
    assert "1 of 9 images are blurred" in page


def test_the_summary_names_the_worst_and_counts_the_rest() -> None:
    def flaw(name: str, level: str, count: int = 1) -> Flaw:
        files = tuple(f"{number}.png" for number in range(min(count, 10)))
        return Flaw(source="a", name=name, level=level, text=f"{name} it is", advice="", count=count, files=files)

    def shown(*flaws: Flaw) -> list[tuple[str, str]]:
        return list(flaw_rows(flaws))

    everything = "--check_data shows everything, with pictures"
    note = flaw("series", "to know")
    assert shown() == []
    assert shown(note, note) == [
        ("data check", "nothing to fix; to know: series (--check_data shows them, with pictures)")
    ]
    assert shown(flaw("blurred", "to look at", 4), note) == [
        ("data check", "a: blurred it is (0.png, 1.png, 2.png …)"),
        ("", everything),
    ]
    many = [flaw(str(number), "to fix") for number in range(6)]
    assert [label for label, _ in shown(*many)] == ["data check", "", "", "", ""]
    assert shown(*many)[-1] == ("", f"2 more to look at; {everything}")
