"""Sentences around a new word, in place of captions: those of textual inversion (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec

_SEEN = ("a rendition", "a cropped photo", "a close-up photo", "a good photo")
_LOOKS = ("clean", "nice", "cool", "small")
OBJECT = (
    *(f"a photo of {article} {{}}" for article in ("a", "the", "my", "one")),
    *(f"a photo of {article} {look} {{}}" for article, look in product(("a", "the"), _LOOKS)),
    *(f"a photo of {words} {{}}" for words in ("a dirty", "the weird", "the large")),
    *(f"{seen} of {article} {{}}" for seen, article in product(_SEEN, ("a", "the"))),
    *("a rendering of a {}", "the photo of a {}", "a dark photo of the {}", "a bright photo of the {}"),
)
"""27 sentences; {} is the word."""
_PAINTINGS = (
    *("a cropped", "a clean", "a dirty", "a dark", "a cool", "a close-up", "a bright"),
    *("a good", "a nice", "a small", "a weird", "a large", "a", "the"),
)
STYLE = (
    *(f"{words} painting in the style of {{}}" for words in _PAINTINGS),
    *(f"{picture} in the style of {{}}" for picture in ("a rendering", "a picture", "a rendition")),
)
"""17 sentences."""


def in_place_of_captions(
    datasets: Iterable[DatasetSpec], word: str, sentences: Iterable[str]
) -> tuple[DatasetSpec, ...]:
    """The data sets with one of the sentences, drawn anew at each sight, as the caption of every image to be learnt.

    Regularisation images and preserved ones have their own captions, which do not contain the word.
    """
    texts = tuple(sentence.format(word) for sentence in sentences)
    return tuple(
        replace(
            dataset,
            subsets=tuple(
                replace(subset, sentences=texts, enable_wildcard=True) if subset.learns else subset
                for subset in dataset.subsets
            ),
        )
        for dataset in datasets
    )
