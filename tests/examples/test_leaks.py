"""What is held out is not a near-equal of what is learnt; checked against the comparison of all pairs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning import leaks, small_models
from fine_tuning.instructions import Line, read_line
from library.errors import UserError

WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


def lines(*asked: str) -> list[Line]:
    return [Line(f"my.jsonl, line {number}", text, ()) for number, text in enumerate(asked, 1)]


def by_all_pairs(texts: list[str]) -> set[frozenset[int]]:
    """Groups of near-equal texts by the definition."""
    sets = [leaks._pairs(text) for text in texts]
    often = {pair for pair in frozenset().union(*sets) if sum(pair in one for one in sets) > max(10, len(texts) / 10)}
    sets = [one - often or one for one in sets]
    groups = [{number} for number in range(len(texts))]
    for a, one in enumerate(sets):
        for b, other in enumerate(sets[:a]):
            if len(one & other) >= leaks.ALIKE * len(one | other) - 1e-9 and groups[a] is not groups[b]:
                groups[a] |= groups[b]
                for number in groups[a]:
                    groups[number] = groups[a]
    return {frozenset(group) for group in groups}


@settings(max_examples=200)
@given(st.lists(WORDS, min_size=1, max_size=30))
def test_groups_are_those_of_all_pairs(texts: list[str]) -> None:
    found: dict[int, set[int]] = {}
    for number, group in enumerate(leaks.near_equal(texts)):
        found.setdefault(group, set()).add(number)
    assert set(map(frozenset, found.values())) == by_all_pairs(texts)


def test_case_punctuation_and_single_words_do_not_matter() -> None:
    long = "name three rivers that flow into the black sea from the north"
    texts = [long, long.upper() + "?!", long.replace("three", "four"), "name three capitals", "weather", "Weather."]
    groups = leaks.near_equal(texts)
    assert groups[0] == groups[1] == groups[2]
    assert groups[4] == groups[5]
    assert len(set(groups)) == 3


def test_the_words_of_a_template_say_nothing() -> None:
    template = "Translate the following English word into French and answer with that one word only: "
    draws = random.Random(0)
    words = ["".join(draws.choices("abcdefgh", k=6)) for _ in range(50)]
    assert len(set(leaks.near_equal([template + word for word in words]))) == 50


@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_on_both_sides(seed: int) -> None:
    draws = random.Random(seed)
    words = ["".join(draws.choices("abcdefgh", k=6)) for _ in range(400)]
    texts = [" ".join(words[at : at + 8]) for at in range(0, 400, 8)]
    copies = [text.title() + "." for text in texts[:20]] + [text.replace(text.split()[0], "x") for text in texts[10:30]]
    all_lines = lines(*texts, *copies)
    learnt, held = leaks.split(all_lines, 0.3, seed=seed)
    assert sorted([*learnt, *held], key=lambda line: line.asked) == sorted(all_lines, key=lambda line: line.asked)
    assert abs(len(held) - 0.3 * len(all_lines)) <= 3  # the largest group has three lines
    groups = dict(
        zip((line.asked for line in all_lines), leaks.near_equal([line.asked for line in all_lines]), strict=True)
    )
    assert {groups[line.asked] for line in learnt}.isdisjoint(groups[line.asked] for line in held)


def test_a_side_stays_when_lines_are_added() -> None:
    made = [read_line(line, small_models.tokenizer(), place="here") for line in small_models.instructions("sort", 300)]
    _, few = leaks.split(made[:200], 0.2, seed=0)
    _, more = leaks.split(made, 0.2, seed=0)
    assert len({line.asked for line in few} & {line.asked for line in more}) > 0.6 * len(few)  # 8 of 40 would be chance
    assert leaks.split(made, 0.2, seed=1)[1] != more


def test_nothing_can_be_held_out() -> None:
    with pytest.raises(
        UserError, match=r"my\.jsonl, line 1: no part of the 3 lines .* 1 groups .* the smallest with 3"
    ):
        leaks.split(lines("say a", "Say a.", "say: a"), 0.1, seed=0)
    with pytest.raises(UserError, match=r"of 2 lines none is left to learn"):
        leaks.split(lines("say a", "write b"), 0.99, seed=0)
