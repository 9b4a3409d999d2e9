"""The text that is trained, made from a raw caption: prefix and suffix, shuffled tags."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from library.config.dataset_config import DatasetSpec, SubsetSpec


def is_static(spec: SubsetSpec) -> bool:
    """Whether a caption of this subset is the same text each time."""
    return not spec.shuffle_caption


def caption_text(raw: str, spec: SubsetSpec, rng: random.Random | None) -> str:
    """The trained text, character by character what kohya's trainer makes of `raw`.

    `rng` draws the order of the tags; None leaves it as written. The first `keep_tokens` tags stay in front (they
    count with the prefix, which stands before them). Shuffled tags are stripped and joined with ", " whatever their
    separator was; an unshuffled caption keeps its spaces and separators.
    """
    text = raw
    if spec.caption_prefix:
        text = f"{spec.caption_prefix} {text}"
    if spec.caption_suffix:
        text = f"{text} {spec.caption_suffix}"
    if is_static(spec) or rng is None:
        return text
    tags = [tag.strip() for tag in text.split(spec.caption_separator)]
    kept, loose = tags[: spec.keep_tokens], tags[spec.keep_tokens :]
    rng.shuffle(loose)
    return ", ".join(kept + loose)


def refuse_text_cache_of_changing_captions(datasets: Iterable[DatasetSpec]) -> None:
    """Raises UserError where text encoder outputs cannot be cached, because the text is drawn anew each time."""
    for dataset in datasets:
        for subset in dataset.subsets:
            if not is_static(subset):
                raise UserError(
                    f"cache_text_encoder_outputs and shuffle_caption exclude each other: a shuffled caption is another "
                    f"text each time ({subset.origin}, {subset.image_dir}). Leave one of them out"
                )
