"""Makes the trained text from a raw caption."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.data import tags, wildcards
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec, SubsetSpec
    from library.data.samples import Sample

logger = logging.getLogger(__name__)

# Options that change a caption's text from one sight to the next, in the order in which they act.
_DRAWN = (
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "enable_wildcard"),
    *("token_warmup_step", "shuffle_caption", "caption_tag_dropout_rate"),
)
_ON_TAGS = ("token_warmup_step", "shuffle_caption", "caption_tag_dropout_rate")


# Bytes or characters. Prompts are a few hundred; a file with a line for every occasion (enable_wildcard) some thousand.
LONGEST_CAPTION = 131_072


def refuse_long_caption(size: int, place: str) -> None:
    """Raises UserError for a text that is too long to be a caption, or was joined by mistake."""
    if size > LONGEST_CAPTION:
        raise UserError(f"{place}: {size} bytes; a caption has at most {LONGEST_CAPTION}")


@dataclass(frozen=True)
class Sight:
    """One sight of a caption: its time, and the source of its random draws.

    `draw` returns the random numbers for a purpose: a generator each, so that no option changes another one's draws.
    `epoch` counts from 0; `step` counts the optimizer's steps done before, of `total_steps`.
    """

    draw: Callable[[str], random.Random]
    epoch: int
    step: int
    total_steps: int


def changing_options(spec: SubsetSpec) -> list[str]:
    """The options that make a caption of this subset another text each time."""
    return [name for name in _DRAWN if getattr(spec, name)]


def is_static(spec: SubsetSpec) -> bool:
    """Whether a caption of this subset is the same text each time."""
    return not changing_options(spec)


def as_written(raw: str, spec: SubsetSpec) -> list[str]:
    """The texts that draws start from: one, or with `enable_wildcard` one for each line of `raw`.

    In a static subset that one is the trained text.
    """
    lines = raw.split("\n") if spec.enable_wildcard else [_first_line(raw)]
    return [_with_second_separator(_between(line, spec), spec) for line in lines]


def caption_text(raw: str, spec: SubsetSpec, sight: Sight) -> str:
    """The trained text, character by character what kohya's trainer makes of `raw` for the same draws.

    In this order: the whole caption is dropped; one line is chosen, prefix and suffix are put around it, wildcards are
    filled in; tags are held back (warm-up), shuffled, dropped; the secondary separator is replaced. If anything is done
    to tags, they are stripped and joined with their separator and a space, where kohya's trainer has ", " whatever the
    separator; otherwise the text keeps its spaces and separators.
    """
    if _is_dropped(spec, sight):
        return ""
    line = wildcards.pick_line(raw, sight.draw("caption line")) if spec.enable_wildcard else _first_line(raw)
    # kohya puts the prefix before the first of several lines and the suffix behind the last: the others lack them
    text = _between(line, spec)
    if spec.enable_wildcard:
        text = wildcards.expand(text, sight.draw("wildcard"))
    if any(getattr(spec, name) for name in _ON_TAGS):
        text = _rearranged(text, spec, sight)
    return _with_second_separator(text, spec)


def _is_dropped(spec: SubsetSpec, sight: Sight) -> bool:
    every = spec.caption_dropout_every_n_epochs
    if every and (sight.epoch + 1) % every == 0:  # users count epochs from 1
        return True
    rate = spec.caption_dropout_rate
    return rate > 0 and sight.draw("caption dropout").random() < rate


def _first_line(raw: str) -> str:
    return raw.split("\n", 1)[0]


def _between(text: str, spec: SubsetSpec) -> str:
    """`text` between prefix and suffix."""
    if spec.caption_prefix:
        text = f"{spec.caption_prefix} {text}"
    if spec.caption_suffix:
        text = f"{text} {spec.caption_suffix}"
    return text


def _rearranged(text: str, spec: SubsetSpec, sight: Sight) -> str:
    front, loose, back = tags.split(text, spec)
    if spec.token_warmup_step:
        loose = tags.warmed_up(loose, spec, step=sight.step, total_steps=sight.total_steps)
    if spec.shuffle_caption:
        sight.draw("caption").shuffle(loose)
    if spec.caption_tag_dropout_rate:
        loose = tags.dropped_out(loose, spec.caption_tag_dropout_rate, sight.draw("tag dropout"))
    return tags.Tags(front, loose, back).joined(spec.caption_separator)


def _with_second_separator(text: str, spec: SubsetSpec) -> str:
    if not spec.secondary_separator:
        return text
    return text.replace(spec.secondary_separator, spec.caption_separator)


def refuse_text_cache_of_changing_captions(
    datasets: Iterable[DatasetSpec], *, option: str = "cache_text_encoder_outputs"
) -> None:
    """Raises UserError if text encoder outputs cannot be cached because the text changes from one sight to the next."""
    for subset in _subsets(datasets):
        if options := changing_options(subset):
            raise UserError(
                f"{option} and {' and '.join(options)} exclude each other: a caption would "
                f"change each time it is seen ({subset.origin}, {subset.source}). Leave one of them out"
            )


def warn_of_captions_options(datasets: Iterable[DatasetSpec]) -> None:
    """Warn of options about captions that do not have the effect that a user will expect."""
    for message in dict.fromkeys(message for subset in _subsets(datasets) for message in _doubts(subset)):
        logger.warning(message)


def _doubts(spec: SubsetSpec) -> Iterator[str]:
    if spec.keep_tokens_separator and not any(getattr(spec, name) for name in _ON_TAGS):
        yield (
            f"{spec.origin}: keep_tokens_separator '{spec.keep_tokens_separator}' stays in the text, without effect: "
            f"it matters only together with {', '.join(_ON_TAGS)}"
        )
    if spec.token_warmup_min != 1 and not spec.token_warmup_step:
        yield f"{spec.origin}: token_warmup_min has no effect: it matters only together with token_warmup_step"
    if spec.caption_dropout_rate == 1 or spec.caption_dropout_every_n_epochs == 1:
        yield f"{spec.origin}: every caption is dropped: caption_dropout_rate or caption_dropout_every_n_epochs is 1"


def warn_of_captions_without_tags(samples: Iterable[Sample]) -> None:
    """Warn of subsets without any caption that has the separator of tags."""
    found: dict[SubsetSpec, list[str]] = {}
    for sample in samples:
        if any(getattr(sample.subset, name) for name in _ON_TAGS):
            found.setdefault(sample.subset, []).extend(as_written(sample.caption, sample.subset))
    for spec, texts in found.items():
        if not any(spec.caption_separator in text for text in texts):
            idle = [name for name in ("shuffle_caption", "token_warmup_step") if getattr(spec, name)]
            effects = [f"{' and '.join(idle)} change nothing"] * bool(idle)
            effects += ["caption_tag_dropout_rate drops whole captions"] * bool(spec.caption_tag_dropout_rate)
            logger.warning(
                "%s: the caption_separator '%s' occurs in no caption of %s: each is one tag, and %s",
                *(spec.origin, spec.caption_separator, spec.source, ", ".join(effects)),
            )


def _subsets(datasets: Iterable[DatasetSpec]) -> Iterator[SubsetSpec]:
    for dataset in datasets:
        yield from dataset.subsets
