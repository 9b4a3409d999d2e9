"""All checks of all folders, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from library.data.quality import blur, duplicates, sizes, texts, words
from library.data.quality.folder import Check, Data, Finding, Folder, Item, Level
from library.progress import bar


def unreadable(folder: Folder, data: Data) -> Iterator[Finding]:
    """Files that cannot be read."""
    if folder.faults:
        yield Finding(
            "unreadable",
            Level.MUST,
            f"{len(folder.faults)} file{'s' * (len(folder.faults) != 1)} cannot be read",
            "training stops there: replace them, save captions as UTF-8 (--skip_bad_images leaves out images)",
            tuple(Item(path, reason) for path, reason in folder.faults.items()),
        )


CHECKS: tuple[Check, ...] = (unreadable, sizes.check, blur.check, duplicates.check, texts.check, words.check)
"""In the order in which findings of one level are shown."""


@dataclass(frozen=True)
class Checked:
    """A folder with its findings, the worst first, and its figures.

    `different_images`, `different_captions`: effective numbers as shares of all (`statistics.effective_number`);
    `different_tags`: the effective number of tags. `caption_length`: the mean in characters. `tags`: (tag, images), the
    commonest first. `data_sets`: the settings in which the data sets differ that have this folder, if several have it.
    """

    folder: Folder
    findings: tuple[Finding, ...]
    different_images: float
    different_captions: float
    different_tags: float
    caption_length: float
    tags: tuple[tuple[str, int], ...]
    data_sets: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        return self.folder.source


def check(folders: Sequence[Folder], *, count_tokens: Callable[[str], int], token_limit: int) -> list[Checked]:
    """Every check on every folder. A folder that several data sets have is listed once.

    `count_tokens`, `token_limit`: of the model, whose tokenizer decides what is cut.
    """
    pictures = tuple(picture for folder in folders for picture in folder.pictures)
    near = duplicates.near_duplicates((picture.path, picture.look, picture.content) for picture in pictures)
    data = Data(pictures, near, count_tokens, token_limit)
    done: dict[Path, list[Checked]] = {}
    for folder in bar(folders, desc="checking folders", total=len(folders), unit="folder"):
        found = [finding for one in CHECKS for finding in one(folder, data)]
        captions, tags = words.diversity(folder)
        done.setdefault(folder.source, []).append(
            Checked(
                folder,
                tuple(sorted(found, key=lambda finding: finding.level.rank)),
                duplicates.diversity(folder, near),
                captions,
                tags,
                fmean([len(picture.text) for picture in folder.pictures] or [0]),
                tuple(words.tag_counts(folder).items()),
            )
        )
    return [_joined(same) for same in done.values()]


def _joined(same: Sequence[Checked]) -> Checked:
    """A folder as several data sets have it. Findings that only some of these have name their settings; the figures are
    those of the first."""
    if len(same) == 1:
        return same[0]
    names = _differences([one.folder for one in same])
    where: dict[Finding, list[str]] = {}
    for name, one in zip(names, same, strict=True):
        for finding in one.findings:
            where.setdefault(finding, []).append(name)
    found = [
        finding if len(own) == len(same) else replace(finding, text=f"{finding.text} (with {' and '.join(own)})")
        for finding, own in where.items()
    ]
    data_sets = tuple(dict.fromkeys(names))
    return replace(
        same[0],
        findings=tuple(sorted(found, key=lambda finding: finding.level.rank)),
        data_sets=data_sets if len(data_sets) > 1 else (),
    )


def _differences(folders: Sequence[Folder]) -> list[str]:
    """For each folder those of its settings that are not the same for all: "resolution 512 × 512, num_repeats 2"."""
    tables = [folder.settings() for folder in folders]
    names = [name for name, value in tables[0].items() if any(table[name] != value for table in tables)]
    return [", ".join(f"{name} {_shown(table[name])}" for name in names) for table in tables]


def _shown(value: object) -> str:
    if isinstance(value, tuple) and all(isinstance(number, int) for number in value):
        return " × ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else repr(value) if isinstance(value, str) else str(value)


def verdict(checked: Sequence[Checked]) -> str:
    """The first thing to do, in a sentence or two."""
    found = sorted(
        ((finding, one) for one in checked for finding in one.findings),
        key=lambda pair: (pair[0].level.rank, -len(pair[0].items)),
    )
    serious = [pair for pair in found if pair[0].level is not Level.NOTE]
    if not serious:
        return "nothing stands against training on this data" + ("; the notes are worth a look" if found else "")
    finding, one = serious[0]
    more = len(serious) - 1
    rest = f". Then {more} more finding{'s' * (more != 1)}" if more else ""
    return f"first, in {one.source}: {finding.text}. {finding.advice[:1].upper()}{finding.advice[1:]}{rest}"
