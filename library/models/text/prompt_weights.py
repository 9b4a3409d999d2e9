"""The weights of words in captions, in A1111's syntax."""

from __future__ import annotations

import re

_UP, _DOWN = 1.1, 1 / 1.1
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|(?P<opening>[(\[])"
    r"|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)"
    r"|(?P<closing>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)


def weighted_texts(caption: str) -> list[tuple[str, float]]:
    """The caption in pieces of one weight each, without the brackets.

    (a) is 1.1, (a:1.3) is 1.3, [a] is 1 / 1.1; weights of nested brackets multiply, and a bracket that is never closed
    reaches to the end. A backslash takes a bracket, or a backslash, literally, and is dropped before anything else. A
    bracket that closes nothing is text.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # for each bracket the number of pieces before it
    for match in _PIECE.finditer(caption):
        if match["opening"]:
            opened[match["opening"]].append(len(pieces))
        elif match["weight"] and opened["("]:
            _weigh(pieces, opened["("].pop(), float(match["weight"]))
        elif match["closing"] == ")" and opened["("]:
            _weigh(pieces, opened["("].pop(), _UP)
        elif match["closing"] == "]" and opened["["]:
            _weigh(pieces, opened["["].pop(), _DOWN)
        else:
            pieces.append((match["escaped"] if match["escaped"] is not None else match[0], 1.0))
    for bracket, factor in (("(", _UP), ("[", _DOWN)):
        for start in opened[bracket]:
            _weigh(pieces, start, factor)
    return _merged(pieces)


def _weigh(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight become one piece: its tokens are then those of the plain text."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged
