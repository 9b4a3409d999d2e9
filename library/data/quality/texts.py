"""Captions that say nothing, say the same, or are not read as they were meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import ftfy.badness

from library.data.quality.folder import Data, Finding, Folder, Item, Level, Picture
from library.progress import bar

SHORT = 10  # characters; below, a caption hardly describes an image
SHARED = 3  # images with one caption
SHOWN = 60  # characters of a caption in a finding

_PLACEHOLDER = re.compile(
    r"to-?do|tbd|fixme|x{3,}|n/?a|none|null|nil|nan|undefined|untitled|placeholder|test|"
    r"captions?|(no|your|insert|add|enter|write)( a| the| your)? (captions?|description|text|prompt)( here)?|"
    r"(captions?|description|text|prompt) here|description|prompt|"
    r"(img|dsc|dscn|dcim|image|picture|photo|screenshot|file)[ _-]?\d+|lorem ipsum.*",
    re.IGNORECASE,
)
_MARKS = re.compile(
    r"(?-i:\b(TODO|FIXME|TBD)\b)|lorem ipsum|\b(caption|description) here\b|\{\{.*\}\}|\[insert", re.IGNORECASE
)


def check(folder: Folder, data: Data) -> Iterator[Finding]:
    """Captions that are empty, placeholders, short, shared, in other encodings, or longer than the model reads."""
    captioned = [picture for picture in folder.pictures if picture.captioned]
    empty = [picture for picture in folder.pictures if not picture.text.strip()]
    filled = [picture for picture in captioned if picture.text.strip()]
    placeholders = [picture for picture in filled if is_placeholder(picture.text)]
    short = [picture for picture in filled if len(picture.text.strip()) < SHORT and not is_placeholder(picture.text)]
    broken = [picture for picture in filled if is_mojibake(picture.text)]
    whole = len(folder.pictures)
    if empty and not folder.subset.is_reg:
        yield Finding(
            "caption empty",
            Level.SHOULD,
            f"{len(empty)} of {whole} images have no caption, or an empty one",
            "describe them, or leave them out; caption_dropout_rate is the way to train without captions now and then",
            _items(empty, lambda picture: "no caption file" if not picture.captioned else "empty"),
        )
    if placeholders:
        yield Finding(
            "placeholder",
            Level.MUST,
            f"{len(placeholders)} of {whole} captions are placeholders",
            "write the captions: the LoRA learns these words otherwise",
            _items(placeholders, _quoted),
        )
    if broken:
        yield Finding(
            "other encoding",
            Level.MUST,
            f"{len(broken)} of {whole} captions hold characters of another encoding, such as Ã© for é",
            "save them as UTF-8 again, from the original",
            _items(broken, _quoted),
        )
    if short:
        yield Finding(
            "caption short",
            Level.NOTE,
            f"{len(short)} of {whole} captions have fewer than {SHORT} characters",
            "fine for a trigger word alone; else everything else in the image is learnt as part of it",
            _items(short, _quoted),
        )
    yield from _shared(filled, whole)
    yield from _cut(folder.pictures, data)


def is_placeholder(text: str) -> bool:
    """Whether a caption stands for one that is still to be written."""
    words = text.strip(" \t\"'<>[](){}:.!")
    return not any(map(str.isalnum, text)) or bool(_PLACEHOLDER.fullmatch(words) or _MARKS.search(text))


def is_mojibake(text: str) -> bool:
    """Whether UTF-8 was read as another encoding somewhere on the way, and then saved."""
    return "\N{REPLACEMENT CHARACTER}" in text or ftfy.badness.is_bad(text)


def _shared(filled: list[Picture], whole: int) -> Iterator[Finding]:
    by_text: dict[str, list[Picture]] = {}
    for picture in filled:
        by_text.setdefault(" ".join(picture.text.lower().split()), []).append(picture)
    groups = sorted((found for found in by_text.values() if len(found) >= SHARED), key=len, reverse=True)
    if groups:
        count = sum(map(len, groups))
        yield Finding(
            "one caption, many images",
            Level.NOTE,
            f"{count} of {whole} images share their caption with at least {SHARED - 1} others; the commonest, "
            f"{_quoted(groups[0][0])}, is on {len(groups[0])}",
            "a style or a person can be learnt so; what differs from image to image is controlled by words only if the "
            "captions name it",
            tuple(
                Item(picture.path, _quoted(picture), number)
                for number, group in enumerate(groups, 1)
                for picture in group
            ),
        )


def _cut(pictures: tuple[Picture, ...], data: Data) -> Iterator[Finding]:
    different = {picture.text for picture in pictures if picture.text}
    lengths = {text: data.count_tokens(text) for text in bar(different, desc="captions", total=len(different))}
    long = [picture for picture in pictures if lengths.get(picture.text, 0) > data.token_limit]
    if long:
        yield Finding(
            "caption cut",
            Level.SHOULD,
            f"{len(long)} of {len(pictures)} captions are cut at {data.token_limit} tokens",
            "shorten them, put the important words first, or give --max_token_length 150 or 225",
            _items(
                sorted(long, key=lambda picture: -lengths[picture.text]),
                lambda picture: f"{lengths[picture.text]} tokens: {_quoted(picture)}",
            ),
        )


def _items(pictures: list[Picture], detail: Callable[[Picture], str]) -> tuple[Item, ...]:
    return tuple(Item(picture.path, detail(picture)) for picture in pictures)


def _quoted(picture: Picture) -> str:
    text = " ".join(picture.text.split())
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[: SHOWN - 1]}…'"
