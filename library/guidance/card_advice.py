"""The part of `--recommend` about the card: the options by which `--fit` would make the recommended run fit into it."""

from __future__ import annotations

import dataclasses

from library.errors import UserError
from library.guidance import fit, verdict
from library.guidance.advice import Advice, is_final
from library.guidance.card import Card, card_of
from library.guidance.levers import with_changes
from library.run.plan import Plan
from library.units import human_bytes

_THAT_MATTER = ("network_module", "network_dim", "train_batch_size", "network_train_unet_only")
"""The recommended options that change what memory a run needs."""


def for_card(plan: Plan, advice: list[Advice]) -> tuple[list[Advice], str]:
    """The advice with the options by which `--fit` would make this run fit into the card, and a sentence about the
    card; without a card, or for a network of another package, the advice as it is."""
    card = card_of(plan.options)
    if card is None or not verdict.is_computable(plan):
        return advice, ""
    changes = {
        item.option: item.value
        for item in advice
        if item.option in _THAT_MATTER and not is_final(plan.options, item.option)
    }
    advised = dataclasses.replace(plan, options=with_changes(plan.options, changes))
    try:
        chosen = fit.choose(advised, card, verdict.estimator(plan))
    except UserError as error:
        return advice, str(error).removeprefix("--fit: ")
    added = [
        Advice(
            name, _plain(value), f"for {human_bytes(card.total)}: {lever.time:.2f} × the time of a step, {lever.source}"
        )
        for lever in chosen.levers
        for name, value in lever.changes.items()
    ]
    left_out = {item.option for item in added}
    if {"network_train_unet_only", "cache_text_encoder_outputs"} <= left_out:
        left_out.add("text_encoder_lr")
    return [*(item for item in advice if item.option not in left_out), *added], _verdict(chosen, card)


def _verdict(chosen: fit.Choice, card: Card) -> str:
    how = "with the settings for it below" if chosen.levers else "as it is"
    return f"{card}; it fits {how}: {human_bytes(chosen.needs.largest.total)} in {chosen.needs.largest.name}"


def _plain(value: object) -> int | float | str | bool:
    assert isinstance(value, int | float | str)
    return value
