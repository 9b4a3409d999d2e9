"""Links within the documents lead somewhere, and the index of DECISIONS.md has all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "tests" / "yardstick" / "CHANGES.md",
]


def _without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", _without_code(path), re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in _anchors(there), f"{path.name} links to {target}"


def test_the_index_has_every_decision() -> None:
    text = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
    index = text[text.index("## Index") : text.index("## 20")]
    linked = re.findall(r"\(#([^)]*)\)", index)
    headings = [_anchor(heading) for heading in re.findall(r"^## (20.*)$", text, re.MULTILINE)]
    assert sorted(linked) == sorted(headings)


def test_the_tests_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in (ROOT / "library").glob("*/__init__.py")}
    assert rooms <= {path.name for path in (ROOT / "tests").iterdir()}
