"""The exact text that is trained. Expected texts follow kohya-ss/sd-scripts v0.10, process_caption.

`caption` makes one with scripted draws: a shuffle turns the order round, a choice takes the last, and chances come from
a list. Where draws are real, their distribution is compared.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.captions import (
    Sight,
    as_written,
    caption_text,
    changing_options,
    is_static,
    refuse_text_cache_of_changing_captions,
    warn_of_captions_options,
    warn_of_captions_without_tags,
)
from library.data.samples import Sample
from library.errors import UserError
from library.rng import python_random

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]


class Scripted(random.Random):
    def __init__(self, chances: Iterable[float]) -> None:
        super().__init__(0)
        self.chances = iter(chances)

    def shuffle(self, x: list) -> None:  # type: ignore[override]
        x.reverse()

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[-1]

    def random(self) -> float:
        return next(self.chances)


def caption(
    raw: str, spec: SubsetSpec, *, chances: Iterable[float] = (), epoch: int = 0, step: int = 0, total_steps: int = 100
) -> str:
    scripted = Scripted(chances)
    return caption_text(raw, spec, Sight(lambda purpose: scripted, epoch, step, total_steps))


def drawn(raw: str, spec: SubsetSpec, repeat: int, *, seed: int = 1, epoch: int = 0) -> str:
    """With the draws of a real run."""
    return caption_text(raw, spec, Sight(partial(python_random, seed, epoch, repeat, "0/a.png"), epoch, 0, 100))


@pytest.mark.parametrize(
    ("changes", "raw", "expected"),
    [
        ({}, "a cat,  on a mat ", "a cat,  on a mat "),
        ({"caption_prefix": "best,"}, "cat", "best, cat"),
        ({"caption_suffix": "photo"}, "cat", "cat photo"),
        ({"caption_prefix": "", "caption_suffix": ""}, "cat", "cat"),
        ({"keep_tokens": 1}, "a,b", "a,b"),
        ({"shuffle_caption": True}, "a, b ,c", "c, b, a"),
        ({"shuffle_caption": True, "keep_tokens": 1}, "a, b, c", "a, c, b"),
        ({"shuffle_caption": True, "keep_tokens": 9}, "a,b,c", "a, b, c"),
        ({"shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "p,"}, "a, b, c", "p, c, b, a"),
        ({"shuffle_caption": True, "caption_suffix": ", s"}, "a, b", "s, b, a"),
        ({"shuffle_caption": True, "caption_suffix": "s"}, "a, b", "b s, a"),
        ({"shuffle_caption": True, "caption_separator": "|"}, "a, b | c", "c| a, b"),
        ({"shuffle_caption": True, "caption_separator": " | "}, "a, b | c", "c | a, b"),
        ({"shuffle_caption": True, "caption_separator": " "}, "a b  c", "c  b a"),
        ({"shuffle_caption": True, "caption_separator": ", "}, "a, b,c", "b,c, a"),
        (
            {"shuffle_caption": True, "caption_separator": ";"},
            "red fox;night sky, stars;hill",
            "hill; night sky, stars; red fox",
        ),
        ({"caption_separator": ";"}, "red fox;night sky, stars;hill", "red fox;night sky, stars;hill"),
        ({"token_warmup_step": 1, "caption_separator": ";", "keep_tokens": 1}, "a;b,c;d", "a; b,c"),
        (
            {"shuffle_caption": True, "caption_separator": ";", "keep_tokens_separator": "|||"},
            "a;b ||| c;d,e",
            "a; b; d,e; c",
        ),
        ({"shuffle_caption": True}, "a,,b", "b, , a"),
        ({"shuffle_caption": True}, "", ""),
        ({}, "first\nsecond", "first"),
        # the part to keep, marked; what is empty between separators goes
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "a, b ||| c, d,, e", "a, b, e, d, c"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "a ||| c, d ||| y, z", "a, d, c, y, z"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "||| c, d", "d, c"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "a|||b|||c|||d", "a, b, c|||d"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 1}, "a, b ||| c, d", "a, b, d, c"),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 1}, "a, b, c", "a, c, b"),
        ({"keep_tokens_separator": "|||"}, "a ||| b", "a ||| b"),  # nothing is done to tags
        # a group of tags
        ({"secondary_separator": ";;;"}, "a;;;b, c", "a,b, c"),
        ({"secondary_separator": ";;;", "shuffle_caption": True}, "a;;;b, c", "c, a,b"),
        ({"secondary_separator": ";;;", "shuffle_caption": True, "caption_separator": "|"}, "a;;;b|c", "c| a|b"),
        ({"secondary_separator": ";", "shuffle_caption": True, "keep_tokens": 1}, "x;y, a, b;c", "x,y, b,c, a"),
        # wildcards
        ({}, "{a|b}, {{c}}", "{a|b}, {{c}}"),
        ({"enable_wildcard": True}, "{a|b} {c|d|e}, {f}", "b e, f"),
        ({"enable_wildcard": True}, "{{retro style}}", "{retro style}"),
        ({"enable_wildcard": True}, "a {x|} b {}", "a  b {}"),
        ({"enable_wildcard": True}, "{a|{b|c}}", "{a|{b|c}"),
        ({"enable_wildcard": True}, "one\ntwo {x|y}", "two y"),
        ({"enable_wildcard": True, "caption_prefix": "{p|q},", "caption_suffix": "s"}, "a\nb", "q, b s"),
        ({"enable_wildcard": True, "shuffle_caption": True}, "a, {b|c, d}", "d, c, a"),
        ({"enable_wildcard": True, "secondary_separator": ";"}, "{a;b|c;d}", "c,d"),
    ],
)
def test_text(subset: MakeSubset, changes: dict, raw: str, expected: str) -> None:
    assert caption(raw, subset(**changes)) == expected


def test_the_example_of_kohyas_manual(subset: MakeSubset) -> None:
    """docs/config_README-en.md: prefix, suffix, kept parts, a group, a wildcard and dropped tags together."""
    spec = subset(
        keep_tokens_separator="|||",
        shuffle_caption=True,
        caption_tag_dropout_rate=0.1,
        secondary_separator=";;;",
        enable_wildcard=True,
        caption_prefix="1girl, hatsune miku, vocaloid |||",
        caption_suffix=", anime screencap ||| masterpiece, rating: general",
    )
    raw = "upper body, sky;;;cloud;;;day, {simple|white} background"
    expected = (
        "1girl, hatsune miku, vocaloid, anime screencap, white background, sky,cloud,day, upper body, "
        "masterpiece, rating: general"
    )
    assert caption(raw, spec, chances=[0.1, 0.5, 0.9, 1.0]) == expected
    assert caption(raw, spec, chances=[0.05, 0.5, 0.09, 1.0]) == (
        "1girl, hatsune miku, vocaloid, white background, upper body, masterpiece, rating: general"
    )


def test_every_line_has_prefix_and_suffix(subset: MakeSubset) -> None:
    """Kohya puts them around the whole file: the first line would be "p, a", the last "c s", all others bare."""
    spec = subset(enable_wildcard=True, caption_prefix="p,", caption_suffix="s")
    assert {drawn("a\nb\nc", spec, repeat) for repeat in range(50)} == {"p, a s", "p, b s", "p, c s"}
    assert as_written("a\nb\nc", spec) == ["p, a s", "p, b s", "p, c s"]


@pytest.mark.parametrize(
    ("step", "expected"),
    # kept: x. Of a … e: 2 + floor(step · (5 - 2) / 10)
    [
        (0, "x, b, a"),
        (3, "x, b, a"),
        (4, "x, c, b, a"),
        (7, "x, d, c, b, a"),
        (9, "x, d, c, b, a"),
        (10, "x, e, d, c, b, a"),
    ],
)
def test_token_warmup(subset: MakeSubset, step: int, expected: str) -> None:
    spec = subset(token_warmup_min=2, token_warmup_step=10.0, shuffle_caption=True, keep_tokens=1)
    assert caption("x,a,b,c,d,e", spec, step=step) == expected
    share = subset(token_warmup_min=2, token_warmup_step=0.1, shuffle_caption=True, keep_tokens=1)
    assert caption("x,a,b,c,d,e", share, step=step, total_steps=105) == expected  # floor(10.5)


def test_token_warmup_of_short_captions_and_alone(subset: MakeSubset) -> None:
    spec = subset(token_warmup_min=3, token_warmup_step=10.0)
    assert {caption("a,  b", spec, step=step) for step in (0, 1, 5, 9, 10)} == {"a, b"}
    none = subset(token_warmup_min=0, token_warmup_step=4.0)
    assert [caption("a,b", none, step=step) for step in range(5)] == ["", "", "a", "a", "a, b"]
    assert caption("a,b", subset(token_warmup_step=0.001), total_steps=10) == "a, b"  # 0 steps


def test_dropped_tags(subset: MakeSubset) -> None:
    spec = subset(caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert caption("x, a, b ,c", spec, chances=[0.49, 0.5, 0.51]) == "x, b, c"  # a draw below the rate drops
    assert caption("x, a, b", spec, chances=[0, 0]) == "x"
    all_of_them = subset(caption_tag_dropout_rate=1.0)
    assert caption("a, b", all_of_them, chances=[0.9, 0.999]) == ""


def test_dropped_captions(subset: MakeSubset) -> None:
    spec = subset(caption_dropout_rate=0.25, caption_prefix="p", enable_wildcard=True)
    assert caption("a", spec, chances=[0.249]) == ""  # the prefix goes, too
    assert caption("a", spec, chances=[0.25]) == "p a"
    every = subset(caption_dropout_every_n_epochs=3)
    assert [caption("a", every, epoch=epoch) for epoch in range(7)] == ["a", "a", "", "a", "a", "", "a"]


def test_shares_of_what_is_dropped(subset: MakeSubset) -> None:
    captions = [drawn("a, b, c, d", subset(caption_dropout_rate=0.2), repeat) for repeat in range(2000)]
    assert 0.17 < captions.count("") / 2000 < 0.23  # a standard deviation is 0.009
    tags = Counter(
        tag
        for repeat in range(2000)
        for tag in drawn("a, b, c, d", subset(caption_tag_dropout_rate=0.3), repeat).split(", ")
    )
    assert all(0.67 < tags[tag] / 2000 < 0.73 for tag in "abcd")  # 0.010


def test_shares_of_wildcards_and_lines(subset: MakeSubset) -> None:
    spec = subset(enable_wildcard=True)
    texts = Counter(drawn("a {1|2|3}\nb\nc {x|y}", spec, repeat) for repeat in range(3000))
    assert set(texts) == {"a 1", "a 2", "a 3", "b", "c x", "c y"}
    assert all(abs(texts[text] - 333) < 80 for text in ("a 1", "a 2", "a 3"))  # 17
    assert abs(texts["b"] - 1000) < 120  # 26
    assert abs(texts["c x"] - 500) < 100  # 20


def test_every_order_comes_and_the_kept_stay(subset: MakeSubset) -> None:
    spec = subset(shuffle_caption=True, keep_tokens=1)
    texts = Counter(drawn("x, a, b, c", spec, repeat) for repeat in range(1200))
    assert len(texts) == 6
    assert all(abs(count - 200) < 60 for count in texts.values())  # 13
    assert all(text.startswith("x, ") and sorted(text.split(", ")) == ["a", "b", "c", "x"] for text in texts)


def test_one_key_one_text_and_no_option_changes_the_draws_of_another(subset: MakeSubset) -> None:
    raw = "{x|y|z}, a, b, c, d, e, f"
    spec = subset(shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.3, caption_dropout_rate=0.3)
    texts = [drawn(raw, spec, repeat) for repeat in range(50)]
    assert texts == [drawn(raw, spec, repeat) for repeat in range(50)]
    assert texts != [drawn(raw, spec, repeat, seed=2) for repeat in range(50)]
    assert texts != [drawn(raw, spec, repeat, epoch=1) for repeat in range(50)]
    whole = subset(shuffle_caption=True, enable_wildcard=True)
    for repeat, text in enumerate(texts):
        order = drawn(raw, whole, repeat).split(", ")
        assert not text or [tag for tag in order if tag in text.split(", ")] == text.split(", ")


def test_as_written(subset: MakeSubset) -> None:
    assert as_written("b,a", subset(shuffle_caption=True, caption_prefix="p,")) == ["p, b,a"]
    assert as_written("a;b\nc", subset(secondary_separator=";")) == ["a,b"]
    assert as_written("a {x|y}\nb", subset(enable_wildcard=True)) == ["a {x|y}", "b"]
    for changes in ({}, {"caption_prefix": "p", "secondary_separator": ";"}):
        assert as_written("a; b\nc", subset(**changes)) == [caption("a; b\nc", subset(**changes))]


CHANGING = {
    "shuffle_caption": True,
    "caption_dropout_rate": 0.1,
    "caption_dropout_every_n_epochs": 2,
    "caption_tag_dropout_rate": 0.1,
    "token_warmup_step": 0.5,
    "enable_wildcard": True,
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_the_text_cannot_be_cached(subset: MakeSubset, dataset: MakeDataset, name: str) -> None:
    changing = subset(**{name: CHANGING[name]}, origin="the second subset")
    assert changing_options(changing) == [name]
    assert not is_static(changing)
    with pytest.raises(UserError, match=rf"cache_text_encoder_outputs and {name} exclude.*the second subset"):
        refuse_text_cache_of_changing_captions([dataset(subset()), dataset(subset(), changing)])


def test_what_does_not_change_the_text_can_be_cached(subset: MakeSubset, dataset: MakeDataset) -> None:
    spec = subset(caption_prefix="p", keep_tokens=2, keep_tokens_separator="|", secondary_separator=";")
    assert is_static(spec)
    refuse_text_cache_of_changing_captions([dataset(spec)])


def test_options_that_will_disappoint(
    subset: MakeSubset, dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_captions_options([dataset(subset(keep_tokens_separator="|||", shuffle_caption=True, token_warmup_step=9))])
    assert not caplog.records
    odd = subset(keep_tokens_separator="|||", token_warmup_min=3, caption_dropout_every_n_epochs=1)
    warn_of_captions_options([dataset(odd, odd)])
    assert [record.getMessage() for record in caplog.records] == [
        "data.toml, subset 1: keep_tokens_separator '|||' stays in the text, without effect: it matters only together "
        "with token_warmup_step, shuffle_caption, caption_tag_dropout_rate",
        "data.toml, subset 1: token_warmup_min has no effect: it matters only together with token_warmup_step",
        "data.toml, subset 1: every caption is dropped: caption_dropout_rate or caption_dropout_every_n_epochs is 1",
    ]


def test_dropped_tags_leave_the_separator(subset: MakeSubset) -> None:
    spec = subset(caption_tag_dropout_rate=0.5, caption_separator=";")
    assert caption("a;b,c;d;e", spec, chances=[0.9, 0.6, 0.1, 0.7]) == "a; b,c; e"


def test_captions_without_the_separator_are_told(subset: MakeSubset, caplog: pytest.LogCaptureFixture) -> None:
    def told(*captions: str, **changes: object) -> str:
        caplog.clear()
        spec = subset(caption_separator=";", **changes)
        warn_of_captions_without_tags(Sample(Path("a.png"), "a", text, spec, (64, 64), 1) for text in captions)
        return caplog.text

    assert told("a, b", "c") == ""  # nothing is done to tags
    assert told("a, b", "c;d", shuffle_caption=True) == ""
    assert "the caption_separator ';' occurs in no caption of" in told("a, b", "c", shuffle_caption=True)
    assert "each is one tag, and shuffle_caption change nothing" in caplog.text
    assert "caption_tag_dropout_rate drops whole captions" in told("a, b", caption_tag_dropout_rate=0.1)
