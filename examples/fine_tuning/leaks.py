"""Holds lines out without leaks: a model that has learnt a prompt is not asked a near-equal one."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from fine_tuning.instructions import Line
from library import rng
from library.errors import UserError

ALIKE = 0.6
"""Prompts are near-equal if they have this share of their pairs of words in common (Jaccard)."""


def split(lines: Sequence[Line], share: float, *, seed: int) -> tuple[list[Line], list[Line]]:
    """Lines to learn from, and about this share of them to hold out. Near-equal prompts are never on both sides.

    A group's side depends on its own texts and the seed, so lines that are added later move few others. Raises
    UserError if all prompts are near-equal, or no line is left to learn from.
    """
    groups = near_equal([line.asked for line in lines])
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    room, held = max(1, round(share * len(lines))), set[int]()
    in_order = sorted(members.values(), key=lambda group: rng.key_of(seed, min(lines[one].asked for one in group)))
    for same in in_order:
        if len(same) <= room - len(held):
            held.update(same)
    if len(held) == len(lines):
        raise UserError(f"{lines[0].place}: of {len(lines)} lines none is left to learn: hold out a smaller share")
    if not held:
        smallest = min(map(len, members.values()))
        raise UserError(
            f"{lines[0].place}: no part of the {len(lines)} lines can be held out: their prompts are {len(members)} "
            f"groups of near-equal ones, the smallest with {smallest}"
        )
    sides: tuple[list[Line], list[Line]] = ([], [])
    for number, line in enumerate(lines):
        sides[number in held].append(line)
    return sides


def near_equal(texts: Sequence[str]) -> list[int]:
    """The number of each text's group: texts in a chain of near-equal ones have the same.

    Near-equal: the same words but for case, punctuation and spaces, or at least `ALIKE` of the pairs of neighbouring
    words in common, without those of more than a tenth of all texts (and of more than 10): the words of a template say
    nothing. Two such sets share one of the few rarest pairs of each (prefix filter, Bayardo et al. 2007), so not all
    texts are compared.
    """
    sets = [_pairs(text) for text in texts]
    counts = Counter(pair for pairs in sets for pair in pairs)
    frequent = {pair for pair, count in counts.items() if count > max(10, len(texts) / 10)}
    sets = [pairs - frequent or pairs for pairs in sets]
    groups = list(range(len(texts)))

    def root(number: int) -> int:
        while groups[number] != number:
            groups[number] = number = groups[groups[number]]
        return number

    with_pair: dict[object, list[int]] = {}
    for number, pairs in enumerate(sets):
        rarest = sorted(pairs, key=lambda pair: (counts[pair], pair))
        prefix = rarest[: len(pairs) - math.ceil(ALIKE * len(pairs) - 1e-9) + 1]
        for other in {other for pair in prefix for other in with_pair.get(pair, ())}:
            if root(other) != root(number) and _jaccard(pairs, sets[other]) >= ALIKE:
                groups[root(number)] = root(other)
        for pair in prefix:
            with_pair.setdefault(pair, []).append(number)
    return [root(number) for number in range(len(texts))]


def _pairs(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    if len(words) < 2:
        return frozenset({tuple(words) or (text.strip(),)})
    return frozenset(pairwise(words))


def _jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)
