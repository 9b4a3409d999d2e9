"""Tags of a folder's captions: the word that all should have, styles of writing, common and rare ones, diversity."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from library.data import tags
from library.data.quality.folder import Data, Finding, Folder, Item, Level, Picture
from library.data.quality.statistics import effective_number

TRIGGER = 0.8  # the share of captions that begin with one word or tag, from which it is meant to be in all of them
USUAL = re.compile(  # beginnings of captions in any data set
    r"an?|the|this|th(is|ere) is|in|on|with|two|photo(graph)?s?|pictures?|images?|illustrations?|drawings?|paintings?|"
    r"close-?up|a (photo(graph)?|picture|image|drawing|painting)|\d+\+?(girl|boy|other)s?|solo|no humans"
)
MIXED = 0.05  # the share of captions written in the rarer style, from which the folder is mixed
FEW = 5  # captions; in smaller folders nothing is common or rare


def tag_counts(folder: Folder) -> Counter[str]:
    """The number of captions that have each tag, the commonest first. A caption without separators is one tag."""
    counts: Counter[str] = Counter()
    for picture in folder.pictures:
        counts.update(set(_tags(picture.text, folder.subset.caption_separator)))
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def check(folder: Folder, data: Data) -> Iterator[Finding]:
    """A trigger word that some captions lack, tags mixed with sentences, tags in all captions, tags in one."""
    captioned = [picture for picture in folder.pictures if picture.captioned and picture.text.strip()]
    if len(captioned) < FEW:
        return
    separator = folder.subset.caption_separator
    trigger, lacking = _trigger(captioned, separator)
    if lacking:
        yield Finding(
            "trigger word missing",
            Level.SHOULD,
            f"'{trigger}', with which most captions begin, is missing in {len(lacking)} of {len(captioned)}",
            "add it, if it is the word to call the LoRA with (caption_prefix puts it before every caption)",
            tuple(Item(picture.path, f"'{picture.text[:60]}'") for picture in lacking),
        )
    kinds = [is_sentence(picture.text, separator) for picture in captioned]
    yield from _mixed(captioned, kinds)
    if kinds.count(True) <= len(kinds) / 2:
        yield from _constant_and_rare(folder)


def _constant_and_rare(folder: Folder) -> Iterator[Finding]:
    counts = tag_counts(folder)
    constant = [tag for tag, number in counts.items() if number == len(folder.pictures)]
    if len(counts) > len(constant) > 1:  # one is the trigger word
        yield Finding(
            "constant tags",
            Level.NOTE,
            f"{len(constant)} tags are in every caption: {_listed(constant)}",
            "together they are one trigger; leave out those whose thing should stay changeable",
        )
    rare = [tag for tag, number in counts.items() if number == 1]
    if 0 < len(rare) <= len(counts) / 2:  # otherwise each image has a description of its own
        yield Finding(
            "rare tags",
            Level.NOTE,
            f"{len(rare)} of {len(counts)} tags are on one image alone: {_listed(rare)}",
            "a tag is learnt from several images; look for misspelt ones",
        )


def diversity(folder: Folder) -> tuple[float, float]:
    """(the effective number of different captions as a share of all, the effective number of tags)."""
    texts = [" ".join(picture.text.lower().split()) for picture in folder.pictures]
    each = [tag for picture in folder.pictures for tag in _tags(picture.text, folder.subset.caption_separator)]
    return (effective_number(texts) / len(texts) if texts else 1.0), effective_number(each)


def is_sentence(text: str, separator: str) -> bool | None:
    """Whether a caption is written in sentences; False for a list of tags, None where it could be either."""
    parts = list(filter(None, tags.stripped(text, separator)))
    words = len(text.split())
    if text.rstrip().endswith((".", "!")) or ". " in text.strip() or (parts and words / len(parts) >= 6):
        return True
    return False if len(parts) >= 3 and words / len(parts) <= 3 else None


def _tags(text: str, separator: str) -> list[str]:
    return [tag.lower() for tag in tags.stripped(text, separator) if tag]


def _trigger(captioned: Sequence[Picture], separator: str) -> tuple[str, list[Picture]]:
    """The first tag, or else the first word, of most captions, and the images whose caption has it nowhere. ("", [])
    where they begin in different ways, or as captions usually do."""
    texts = [picture.text.lower() for picture in captioned]
    firsts = (
        [_tags(text, separator)[:1] for text in texts],
        [[word.strip(",.;:") for word in text.split()[:1]] for text in texts],
    )
    for found in firsts:
        for trigger, number in Counter(first[0] for first in found if first).most_common(1):
            if TRIGGER * len(texts) <= number and not USUAL.fullmatch(trigger):
                return trigger, [picture for picture, text in zip(captioned, texts, strict=True) if trigger not in text]
    return "", []


def _mixed(captioned: Sequence[Picture], kinds: Sequence[bool | None]) -> Iterator[Finding]:
    sentences, lists = kinds.count(True), kinds.count(False)
    fewer = sentences <= lists
    rarer = [picture for picture, kind in zip(captioned, kinds, strict=True) if kind is fewer]
    if len(rarer) >= max(1, MIXED * len(captioned)):
        yield Finding(
            "tags and sentences",
            Level.NOTE,
            f"{lists} captions are lists of tags and {sentences} are sentences",
            "a prompt in one style then calls only a part of the folder: write all in one, or give each image both",
            tuple(Item(picture.path, f"'{picture.text[:60]}'") for picture in rarer),
        )


def _listed(words: Sequence[str], most: int = 10) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")
