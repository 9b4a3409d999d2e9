"""The exact text that is trained. Expected texts follow kohya-ss/sd-scripts v0.10, process_caption."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from library.config.dataset_config import DatasetSpec, SubsetSpec
from library.data.captions import caption_text, is_static, refuse_text_cache_of_changing_captions
from library.errors import UserError


class Reverse(random.Random):
    """Its shuffle turns the order round."""

    def shuffle(self, x: list) -> None:  # type: ignore[override]
        x.reverse()


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
        ({"shuffle_caption": True, "caption_separator": "|"}, "a, b | c", "c, a, b"),
        ({"shuffle_caption": True}, "a,,b", "b, , a"),
        ({"shuffle_caption": True}, "", ""),
    ],
)
def test_text(subset: Callable[..., SubsetSpec], changes: dict, raw: str, expected: str) -> None:
    assert caption_text(raw, subset(**changes), Reverse()) == expected


def test_every_order_comes_and_the_kept_stay(subset: Callable[..., SubsetSpec]) -> None:
    spec = subset(shuffle_caption=True, keep_tokens=1)
    texts = {caption_text("x, a, b, c", spec, random.Random(seed)) for seed in range(200)}
    assert len(texts) == 6
    assert all(text.startswith("x, ") and sorted(text.split(", ")) == ["a", "b", "c", "x"] for text in texts)


def test_without_a_draw_the_order_is_as_written(subset: Callable[..., SubsetSpec]) -> None:
    assert caption_text("b,a", subset(shuffle_caption=True, caption_prefix="p,"), None) == "p, b,a"


def test_static(subset: Callable[..., SubsetSpec], dataset: Callable[..., DatasetSpec]) -> None:
    assert is_static(subset(caption_prefix="p", keep_tokens=2))
    assert not is_static(subset(shuffle_caption=True))
    refuse_text_cache_of_changing_captions([dataset(subset())])
    with pytest.raises(UserError, match=r"cache_text_encoder_outputs and shuffle_caption.*the second subset"):
        refuse_text_cache_of_changing_captions(
            [dataset(subset()), dataset(subset(), subset(shuffle_caption=True, origin="the second subset"))]
        )
