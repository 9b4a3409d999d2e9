"""The page of `--check_data`: the findings with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from library.data.quality.check import Checked, verdict
from library.data.quality.folder import Finding
from library.progress import bar
from library.report import images, page

SHOWN = 10  # pictures of each finding
TAGS = 25  # bars of the histogram
SIDE = 160  # pixels


def render(checked: Sequence[Checked], *, name: str) -> str:
    """The whole page. Everything from users is escaped by the template."""
    folders = [Path(__file__).parent, Path(page.__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("data.html").render(
        name=name,
        verdict=verdict(checked),
        folders=[_folder(one) for one in bar(checked, desc="pictures", total=len(checked), unit="folder")],
        images=sum(len(one.folder.pictures) for one in checked),
    )


def _folder(one: Checked) -> dict[str, Any]:
    pictures = one.folder.pictures
    most = one.tags[0][1] if one.tags else 1
    return {
        "source": str(one.source),
        "figures": [
            ("images", f"{len(pictures)}"),
            *([("data sets", "; ".join(one.data_sets))] if one.data_sets else []),
            ("held out", str(sum(picture.held_out for picture in pictures))),
            ("sizes", _sizes(one)),
            ("caption", f"{one.caption_length:.0f} characters on average"),
            ("diversity of images", f"{one.different_images:.0%}"),
            ("diversity of captions", f"{one.different_captions:.0%}"),
            ("tags", f"{len(one.tags)}, which count as {one.different_tags:.0f}"),
        ],
        "findings": [_finding(finding) for finding in one.findings],
        "tags": [(tag, number, 100 * number / most) for tag, number in one.tags[:TAGS]],
        "more_tags": max(0, len(one.tags) - TAGS),
    }


def _sizes(one: Checked) -> str:
    sizes = sorted((picture.size for picture in one.folder.pictures), key=lambda size: size[0] * size[1])
    if not sizes:
        return ""
    first, last = (f"{width} × {height}" for width, height in (sizes[0], sizes[-1]))
    return first if first == last else f"{first} to {last}"


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "level": finding.level.name.lower(),
        "word": finding.level.value,
        "text": finding.text,
        "advice": finding.advice,
        "items": [
            {
                "name": item.path.name,
                "path": str(item.path),
                "detail": item.detail,
                "group": item.group,
                "image": images.data_url(item.path, side=SIDE),
            }
            for item in finding.items[:SHOWN]
        ],
        "more": max(0, len(finding.items) - SHOWN),
    }
