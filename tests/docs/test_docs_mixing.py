"""What docs/mixing.md tells a user to type is accepted, and prints what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.config.parser import parse
from library.guidance.moments import _largest
from library.record.summary import _drawn, line
from library.run.about.summary import _images
from library.run.plan import make_plan
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "mixing.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


COMMANDS = [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks("sh")]
FILES = {block.splitlines()[0].removeprefix("# "): block for block in blocks("toml")}


def test_every_data_set_of_the_page_is_used() -> None:
    assert list(FILES) == [words[words.index("--dataset_config") + 1] for words in COMMANDS]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_draws_are_those_of_the_page(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    words, name = COMMANDS[number], list(FILES)[number]
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    words = [str(tmp_path / word) if word == name else word for word in words]
    plan = make_plan(parse([*words, "--output_dir", str(tmp_path)]))
    if name == "resolutions.toml":
        assert _largest(plan.prepared.groups) == ((96, 96), 8)
        assert [group.draws for group in plan.prepared.groups] == [60, 60]
        return
    (shown,) = [text for text in blocks("text") if PAGE.index(text) > PAGE.index(FILES[name])][:1]
    assert shown == "".join(f"{line(label, text)}\n" for label, text in _drawn([*_images(plan)]))
