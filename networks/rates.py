"""Learning rates within a part: by block (kohya's numbers), by depth, by pattern."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from library.errors import UserError, did_you_mean
from networks.layers import first_match, matches, pattern_numbers
from networks.load_report import some_names

if TYPE_CHECKING:
    from library.models.blocks import Blocks
    from networks.adapter import Adapter
    from networks.settings import RateSettings
    from networks.sites import Site

logger = logging.getLogger(__name__)

PatternRates = Sequence[tuple[re.Pattern[str], float]]

# the weight of a block that lies at x in [0, 1] between the first and the last
_SHAPES: dict[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


def block_weights(settings: RateSettings, blocks: Blocks | None) -> tuple[float, ...] | None:
    """A factor on the rate for each of the model's blocks; None if none is given. Raises UserError.

    Each is a list of numbers ("0,0.5,1", a missing one counts as 1) or the name of a shape with an offset
    ("sine+0.25"). A weight that does not exceed `block_lr_zero_threshold` is 0.
    """
    given = {f"{section}_lr_weight": text for section, text in settings.by_section.items() if text is not None}
    if not given:
        if settings.block_lr_zero_threshold:
            raise UserError("block_lr_zero_threshold needs down_lr_weight, mid_lr_weight or up_lr_weight")
        return None
    counts = {} if blocks is None else {f"{section}_lr_weight": count for section, count in blocks.sections}
    if blocks is None or not given.keys() <= counts.keys():
        has = "no numbered blocks" if blocks is None else f"other blocks: {blocks.layout}"
        raise UserError(f"{min(given.keys() - counts.keys())}: this model has {has}")
    weights = [weight for name, count in counts.items() for weight in _weights(name, given.get(name), count)]
    ends, threshold = (1.0,) * blocks.ends, settings.block_lr_zero_threshold
    return (*ends, *(weight if weight > threshold else 0.0 for weight in weights), *ends)


def _weights(name: str, text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    shape, _, offset = text.partition("+")
    if shape in _SHAPES and count > 1:
        return [_SHAPES[shape](i / (count - 1)) + _number(name, offset or "0") for i in range(count)]
    weights = [_number(name, word.strip() or "0") for word in text.split(",")]
    if len(weights) != count:
        fate = "the rest is ignored" if len(weights) > count else "the others have 1"
        logger.warning("%s: %d values for %d blocks, %s", name, len(weights), count, fate)
    return [*weights, *[1.0] * count][:count]


def _number(name: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        raise UserError(
            f"{name}: '{word}' is neither a number nor one of {', '.join(_SHAPES)}{did_you_mean(word, _SHAPES)}"
        ) from None
    if not 0 <= number < math.inf:
        raise UserError(f"{name}: {word} is not a weight, it must be 0 or more")
    return number


def without_zero_blocks(sites: Sequence[Site], weights: Sequence[float] | None) -> list[Site]:
    """As kohya has it, a new network has no adapters in blocks of weight 0: they would stay zero and fill the file."""
    kept = [site for site in sites if weights is None or site.block is None or weights[site.block]]
    if len(kept) < len(sites):
        logger.info("%d layers lie in UNet blocks of weight 0 and get no adapter", len(sites) - len(kept))
    return kept


def pattern_rates(text: str | None) -> list[tuple[re.Pattern[str], float]]:
    """Regular expressions with their rates, from `network_reg_lrs`. Raises UserError."""
    return pattern_numbers("network_reg_lrs", text, "rate")


def split(
    section: str,
    adapters: Sequence[Adapter],
    rate: float,
    *,
    weights: Sequence[float] | None,
    patterns: PatternRates,
    layer_decay: float | None,
) -> dict[str, tuple[float, list[Adapter]]]:
    """The adapters of a section by name of their group, with the rate of each group.

    A pattern's rate holds as it is, the first pattern that matches. For the others the section's `rate` is multiplied
    by the weight of the block and by layer_decay ** (n - 1 - i) in the i-th of the section's n blocks or layers.
    """
    depths = sorted({adapter.site.depth for adapter in adapters if adapter.site.depth is not None})
    if layer_decay is not None and not depths:
        raise UserError(f"--lr_layer_decay: the {section} has no numbered blocks or layers")
    groups: dict[str, tuple[float, list[Adapter]]] = {}
    for adapter in adapters:
        name, own = section, rate
        depth, block = adapter.site.depth, adapter.site.block
        matching = first_match(adapter.site, patterns)
        if matching is not None:
            name, own = f"{section}_reg_lr_{matching}", patterns[matching][1]
        elif depth is not None:
            if weights is not None and block is not None:
                own *= weights[block]
            if layer_decay is not None:
                own *= layer_decay ** (len(depths) - 1 - depths.index(depth))
            if layer_decay is not None or (weights is not None and block is not None):
                name = f"{section}_{'layer' if block is None else 'block'}{depth}"
        groups.setdefault(name, (own, []))[1].append(adapter)
    return groups


def check_patterns(patterns: PatternRates, sites: Sequence[Site]) -> None:
    """`UserError` for a pattern that is never the first to match."""
    used = {first_match(site, patterns) for site in sites}
    for number, (regex, _) in enumerate(patterns):
        if number not in used:
            taken = any(matches(site, (regex,)) for site in sites)
            why = "matches only what earlier patterns match" if taken else "matches nothing"
            raise UserError(
                f"network_reg_lrs: '{regex.pattern}' {why} of the {len(sites)} adapted layers, such as {sites[0].path}"
            )


def freeze(group: str, adapters: Sequence[Adapter]) -> None:
    """Leave these adapters as they are, and say which of them will not be in the file."""
    for adapter in adapters:
        adapter.requires_grad_(False)
    logger.warning("%s: learning rate 0, its %d adapters are not trained", group, len(adapters))
    if zero := [adapter.site.name for adapter in adapters if adapter.stays_zero()]:
        logger.warning("%s: %d of these add nothing and are not in the file:%s", group, len(zero), some_names(zero))
        logger.debug("%s: all of these:\n  %s", group, "\n  ".join(zero))
