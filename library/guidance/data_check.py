"""`--check_data`: the flaws of images and captions, in the console and on a page with pictures. Nothing is changed."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.config.data.dataset_config import load_datasets
from library.config.options import Options
from library.data.prepare import inspect
from library.data.quality.check import Checked, check, verdict
from library.data.quality.folder import Finding, Item
from library.files.atomic import replacing
from library.guidance import data_page
from library.record.summary import count
from library.run import word
from library.run.plan import base_of, check_data_options

logger = logging.getLogger(__name__)

SHOWN = 10  # files of each finding
TAGS = 8


def report(options: Options, *, families: tuple[str, ...] = ()) -> None:
    """Check the data of these options, print the findings and write the page, with `--check_data=list` the list too.

    Raises UserError for mistakes in the options and folders. Unreadable files are findings.
    """
    datasets = word.with_templates(load_datasets(options), options)
    check_data_options(options, datasets)
    family = base_of(options, families=families)
    seed = options.validation.validation_seed
    folders = inspect(
        datasets,
        multiple_of=family.size_divisor,
        seed=(options.training.seed or 0) if seed is None else seed,
        validation_group=options.validation.validation_group,
        fold=options.validation.validation_fold,
    )
    checked = check(folders, count_tokens=family.count_tokens, token_limit=family.token_limit)
    for line in lines(checked):
        print(line)
    output = options.output
    name = output.output_name or "last"
    written = [Path(output.output_dir) / f"{name}-data.html"]
    with replacing(written[0]) as beside:
        beside.write_text(data_page.render(checked, name=name), encoding="utf-8")
    if options.run.check_data == "list":
        written.append(Path(output.output_dir) / f"{name}-data.tsv")
        write_list(written[1], checked)
    print(f"\nwritten: {', '.join(map(str, written))}. Nothing was trained, no image or caption was changed.")
    sys.stdout.flush()


def lines(checked: Sequence[Checked]) -> Iterator[str]:
    """The console's text: each folder with its figures and findings, then the verdict."""
    for one in checked:
        yield f"{one.source}: {figures(one)}"
        if one.data_sets:
            yield f"  in {len(one.data_sets)} data sets: {'; '.join(one.data_sets)}"
        for finding in one.findings:
            yield f"  {finding.level.value:<11} {finding.name}: {finding.text}"
            if finding.items:
                yield f"{'':14}{named(finding)}"
            yield f"{'':14}{finding.advice}"
        if not one.findings:
            yield "  no flaw was found"
    yield f"\nverdict: {verdict(checked)}"


def figures(one: Checked) -> str:
    """Numbers of a folder in one sentence."""
    pictures = one.folder.pictures
    if not pictures:
        return "no image can be read"
    return (
        f"{count(len(pictures), 'image')}, captions of {one.caption_length:.0f} characters on average; diversity: "
        f"images {one.different_images:.0%}, captions {one.different_captions:.0%}, {count(len(one.tags), 'tag')} that "
        f"count as {one.different_tags:.0f}"
    )


def named(finding: Finding) -> str:
    """The first files of a finding with their details."""
    shown = ", ".join(f"{item.path.name} ({_detail(item)})" for item in finding.items[:SHOWN])
    more = len(finding.items) - SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def _detail(item: Item) -> str:
    return f"group {item.group}: {item.detail}" if item.group else item.detail


def write_list(path: Path, checked: Sequence[Checked]) -> None:
    """All files of all findings, one a line, with tabs between: file, finding, level, group, detail."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("file", "finding", "level", "group", "detail"))
        for one in checked:
            for finding in one.findings:
                for item in finding.items:
                    detail = " ".join(item.detail.split())
                    writer.writerow((item.path, finding.name, finding.level.value, item.group or "", detail))
