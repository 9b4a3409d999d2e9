"""Which layers get an adapter: a preset, patterns of their names, and ranks by pattern.

The presets have the names and the choice that LyCORIS' have; attn-qv is ours. Patterns are regular expressions that a
layer's dotted name, or its name in files, matches as a whole (kohya's rule).
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from library.errors import UserError, did_you_mean
from networks.sites import Site, is_spatial, sites_where

if TYPE_CHECKING:
    from torch import nn

    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets
    from networks.settings import LayerSizes

logger = logging.getLogger(__name__)

Patterns = tuple[re.Pattern[str], ...]

_PAIR = re.compile(r"\s*(?P<pattern>.+?)\s*=\s*(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)\s*(?:,|$)")


@dataclass(frozen=True)
class Preset:
    """A choice of layers.

    blocks: those of transformer blocks. within: of these only a part that the family names ("attn-only", "attn-qv").
    conv: the ResNet blocks and resamplers, of them the Linear and 1 x 1 layers or all. more: the first and last
    convolution and the time embedding as well. text: the text encoders.
    """

    blocks: bool = True
    within: str = ""
    conv: Literal["", "linear", "all"] = ""
    more: bool = False
    text: bool = True


PRESETS = {
    "attn-mlp": Preset(),
    "attn-only": Preset(within="attn-only"),
    "attn-qv": Preset(within="attn-qv"),
    "full": Preset(conv="all", more=True),
    "full-lin": Preset(conv="linear", more=True),
    "unet-only": Preset(conv="all", more=True, text=False),
    "unet-transformer-only": Preset(text=False),
    "unet-convblock-only": Preset(blocks=False, conv="all", text=False),
}


def preset_of(name: str | None) -> Preset | None:
    """Raises UserError for an unknown name."""
    if name is None:
        return None
    if name not in PRESETS:
        raise UserError(f"preset: '{name}' is unknown{did_you_mean(name, PRESETS) or '.'} Known: {', '.join(PRESETS)}")
    return PRESETS[name]


def of_preset(targets: Sequence[AdapterTargets], preset: Preset) -> list[Site]:
    """The preset's layers of the model, in the model's order. Raises UserError if the model has no such choice."""

    def wanted(target: AdapterTargets, path: str, module: nn.Module) -> bool:
        if target.part == "text_encoder" and not preset.text:
            return False
        if target.linear.fullmatch(path):
            return preset.blocks and (not preset.within or target.choices[preset.within].fullmatch(path) is not None)
        if not (target.conv.fullmatch(path) and preset.conv) and not (preset.more and target.more.fullmatch(path)):
            return False
        return preset.conv == "all" or not is_spatial(module)

    if preset.within and not all(preset.within in target.choices for target in targets):
        known = ", ".join(name for name, other in PRESETS.items() if not other.within)
        raise UserError(f"preset: this model does not define '{preset.within}'; it has {known}")
    return sites_where(targets, wanted)


def choose(sites: Sequence[Site], sizes: LayerSizes) -> list[Site]:
    """Those that the patterns leave. Raises UserError for patterns that match none of them, or leave nothing.

    As in kohya's networks, a layer that an exclude pattern matches is left out unless an include pattern matches it;
    include patterns alone leave the others out.
    """
    include = patterns_of("include_patterns", sizes.include_patterns, sites)
    exclude = patterns_of("exclude_patterns", sizes.exclude_patterns, sites)
    if not include and not exclude:
        return list(sites)
    kept = [site for site in sites if matches(site, include) or (exclude and not matches(site, exclude))]
    if not kept:
        raise UserError("include_patterns, exclude_patterns: they leave no layer to adapt")
    left_out = len(sites) - len(kept)
    logger.info("%d of %d layers get no adapter, by include_patterns and exclude_patterns", left_out, len(sites))
    return kept


def in_section(sites: Sequence[Site], section: str | None, blocks: Blocks | None) -> list[Site]:
    """Without the layers of the denoiser outside of a section of its blocks; None and "all" leave all. Raises UserError
    for a section that the model has not."""
    if section in (None, "all"):
        return list(sites)
    known = [] if blocks is None else [name for name, _ in blocks.sections]
    if blocks is None or section not in known:
        of_model = f"this model's are {', '.join(known)}, or all" if known else "this model has no numbered blocks"
        raise UserError(f"train_blocks: '{section}': {of_model}{did_you_mean(section or '', known)}")
    wanted = blocks.numbers_in(section or "")
    return [site for site in sites if site.part != "unet" or site.block in wanted]


def in_blocks(sites: Sequence[Site], indices: str | None, blocks: Blocks | None) -> list[Site]:
    """Without the layers in other blocks of the denoiser than these: "0-5,9"; None and "all" are all. Raises UserError
    for numbers that the model has not."""
    if indices is None or indices.strip() == "all":
        return list(sites)
    if blocks is None:
        raise UserError("train_block_indices: this model has no numbered blocks")
    wanted: set[int] = set()
    for word in indices.split(",") if indices.strip() not in ("", "none") else ():
        first, dash, last = (part.strip() for part in word.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and int(end) < blocks.count for end in ends) or int(ends[0]) > int(ends[1]):
            raise UserError(
                f"train_block_indices: '{word.strip()}': numbers or ranges such as 0-5,9 from 0 to {blocks.count - 1} "
                f"are this model's blocks ({blocks.layout})"
            )
        wanted |= set(range(int(ends[0]), int(ends[1]) + 1))
    return [site for site in sites if site.part != "unet" or site.block is None or site.block in wanted]


def patterns_of(name: str, text: str | None, sites: Sequence[Site]) -> Patterns:
    """From a list of regular expressions in Python's form, as kohya has it, or a single one. Raises UserError."""
    if text is None:
        return ()
    words: object = text
    if text.lstrip().startswith(("[", "(")):
        try:
            words = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if text.lstrip().startswith("["):
                raise UserError(f"{name}: {text} is no list of texts, such as ['.*attn1.*', '.*ff.*']") from None
    listed = [words] if isinstance(words, str) else list(words) if isinstance(words, list | tuple) else []
    if not listed or not all(isinstance(word, str) for word in listed):
        raise UserError(f"{name}: {text} is no list of texts, such as ['.*attn1.*', '.*ff.*']")
    return tuple(compiled(name, str(word), sites) for word in listed)


def regular_expression(name: str, pattern: str) -> re.Pattern[str]:
    """Raises UserError."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name}: '{pattern}' is not a regular expression: {error}") from error


def pattern_numbers(name: str, text: str | None, number: str) -> list[tuple[re.Pattern[str], float]]:
    """Regular expressions with their numbers, from "pattern=number,pattern=number". Raises UserError.

    `name`, `number`: of the setting and of its numbers, for messages.
    """
    found, place, text = [], 0, text or ""
    while place < len(text.rstrip(", ")):
        match = _PAIR.match(text, place)
        if match is None:
            raise UserError(f"{name}: '{text[place:]}' is not of the form pattern={number},pattern={number}")
        found.append((regular_expression(name, match["pattern"]), float(match["number"])))
        place = match.end()
    return found


def first_match(site: Site, patterns: Iterable[tuple[re.Pattern[str], object]]) -> int | None:
    """The place of the first of these patterns that matches the layer."""
    return next((place for place, (regex, _) in enumerate(patterns) if matches(site, (regex,))), None)


def compiled(name: str, pattern: str, sites: Sequence[Site]) -> re.Pattern[str]:
    """A regular expression that matches a layer. Raises UserError."""
    regex = regular_expression(name, pattern)
    if not any(matches(site, (regex,)) for site in sites):
        plain = re.sub(r"\\\.|\.\*|[\\^$*+?()|]", lambda found: "." if found[0] == r"\." else "", pattern)
        names = [site.path or site.name for site in sites]
        if pattern and any(regex.search(text) for site in sites for text in (site.path, site.name)):
            near = f", did you mean '.*{f'({pattern})' if '|' in pattern else pattern}.*'?"
        else:
            near = did_you_mean(plain, names) or _like(plain, names) or f"; the first layer is {names[0]}"
        raise UserError(f"{name}: '{pattern}' matches no layer as a whole{near}")
    return regex


def _like(plain: str, names: Sequence[str]) -> str:
    """A layer with the words that are most like a pattern's: of "attnn1.to_q" one with "attn1.to_q"."""
    words = {word for name in names for word in name.split(".")}
    near = ".".join(next(iter(get_close_matches(word, words, n=1)), word) for word in plain.strip(".").split("."))
    name = next((name for name in names if near and near in name), None)
    return "" if name is None else f"; the nearest layer is {name}"


def matches(site: Site, patterns: Patterns) -> bool:
    """Whether one of them matches the layer's dotted name, or its name in files, as a whole."""
    return any(regex.fullmatch(text) for regex in patterns for text in (site.path, site.name))
