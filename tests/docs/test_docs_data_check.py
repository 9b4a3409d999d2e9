"""What docs/data-check.md tells a user to type works, and prints what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.data.quality.blur import BLURRED
from library.data.quality.near import NEAR
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data-check.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ")
SHOWN = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_print_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from docs import flawed_images
    from train_network import main

    monkeypatch.chdir(tmp_path)
    for name in ("configs", "quickstart"):
        Path(name).symlink_to(ROOT / name)
    for line in SHELL.splitlines():
        match shlex.split(line):
            case ["python", "-m", "docs.flawed_images", folder]:
                flawed_images.write(Path(folder))
            case ["python", "train_network.py", *words]:
                assert main(words) == 0
            case ["awk", *_]:
                rows = [row.split("\t") for row in Path("output/flawed-data.tsv").read_text().splitlines()]
                assert [row[0] for row in rows if row[1] == "blurred"] == [
                    "flawed/1_fox/anguished-face.png",
                    "flawed/1_fox/angry-face.png",
                ]
            case other:
                pytest.fail(f"a command of another kind: {other}")
    said = capsys.readouterr().out
    for block in SHOWN:
        for shown in block.splitlines():
            assert shown in said
    assert Path("output/flawed-data.html").is_file()


def test_the_page_names_every_finding_and_the_thresholds() -> None:
    named = set(re.findall(r"^\| ([a-z ,-]+) \| to ", PAGE, flags=re.MULTILINE))
    table = {name for row in named for name in row.split(", ")} - {"one caption", "many images"} | {
        "one caption, many images"
    }
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "library" / "data" / "quality").glob("*.py"))
    assert table == set(re.findall(r'Finding\(\s+"([^"]+)"', sources))
    assert f"From {BLURRED:g} on an image is blurred" in PAGE
    assert f"at least {NEAR:g}" in PAGE
