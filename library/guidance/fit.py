"""`--fit`: chooses the fastest combination of levers with which a run fits into the memory of a card."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError
from library.guidance import verdict
from library.guidance.card import Card, card_of
from library.guidance.levers import Lever, changes_of, levers, with_changes
from library.guidance.moments import Estimator, Needs
from library.progress import progress
from library.units import human_bytes

if TYPE_CHECKING:
    from library.config.options import Options
    from library.run.plan import Plan
    from library.training.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The levers to set, and what the run then needs."""

    levers: tuple[Lever, ...]
    needs: Needs

    @property
    def time(self) -> float:
        """The factor on the time of a step."""
        return math.prod(lever.time for lever in self.levers)

    @property
    def words(self) -> str:
        return " ".join(lever.words for lever in self.levers)


def fitted(plan: Plan) -> Options:
    """The options of `--fit` for this plan; those of the state for a resumed run. Logs what was set and why. Raises
    UserError if nothing fits."""
    guidance = plan.options.guidance
    if not verdict.is_computable(plan):
        raise UserError(f"--fit {guidance.fit}: {verdict.NOT_COMPUTED}; leave it out")
    if plan.resume is not None:
        return _as_resumed(plan, plan.resume)
    card = card_of(plan.options)
    if card is None:
        raise UserError("--fit auto: there is no GPU here; give a size, such as --fit 8GB")
    choice = choose(plan, card)
    if not choice.levers:
        logger.info(
            "--fit: the run fits as it is: %s of %s", human_bytes(choice.needs.largest.total), human_bytes(card.usable)
        )
    for lever in choice.levers:
        logger.info("--fit sets %s: %.2f × the time of a step (%s)", lever.words, lever.time, lever.source)
    if choice.levers:
        logger.info(
            "--fit: %s are needed then, of %s (%s); the fastest of the combinations that fit, an estimated %.2f × the "
            "time of a step",
            human_bytes(choice.needs.largest.total),
            human_bytes(card.usable),
            card,
            choice.time,
        )
    return with_changes(plan.options, changes_of(choice.levers))


def choose(plan: Plan, card: Card, estimates: Estimator | None = None) -> Choice:
    """The fastest combination that fits the card; none if the run fits as it is. Raises UserError if nothing does."""
    estimates = estimates or verdict.estimator(plan)
    all_levers = levers(plan)
    usable = [lever for lever in all_levers if not lever.lacking]
    smallest: tuple[int, Options, tuple[Lever, ...]] | None = None
    with progress(_combinations(usable), desc="combinations of options", unit="", delay=2.0) as bar:
        for chosen in bar:
            if (options := _with(plan, chosen)) is None:
                continue
            floor = estimates.floor(options)
            if smallest is None or (floor, -len(chosen)) < (smallest[0], -len(smallest[2])):
                smallest = floor, options, chosen
            if floor <= card.usable:
                needs = estimates.needs(options)
                if needs.largest.total <= card.usable:
                    return Choice(chosen, needs)
    assert smallest is not None, "the run as it is needs no change of options"
    _, options, chosen = smallest
    least, words = estimates.needs(options).largest, " ".join(lever.words for lever in chosen)
    forbidden = [f"{lever.words} ({lever.lacking})" for lever in all_levers if lever.lacking]
    raise UserError(
        f"--fit: nothing fits into the {human_bytes(card.usable)} that {card.name} leaves for tensors: the least is "
        f"{human_bytes(least.total)}, in {least.name}"
        + (f", with {words}" if words else "")
        + (f". Your own settings rule out: {'; '.join(forbidden)}" if forbidden else "")
        + ". A lower --resolution or --network_dim needs less as well"
    )


def _combinations(usable: Sequence[Lever]) -> Iterator[tuple[Lever, ...]]:
    """Every combination with at most one lever of an axis: first none, then by the estimated time, then by number."""
    axes: dict[str, list[Lever | None]] = {}
    for lever in usable:
        axes.setdefault(lever.axis, [None]).append(lever)
    found = [tuple(filter(None, item)) for item in itertools.product(*axes.values())]
    return iter(
        sorted(
            found,
            key=lambda item: (
                bool(item),
                any(lever.is_last for lever in item),
                round(math.prod(lever.time for lever in item), 6),
                len(item),
            ),
        )
    )


def _with(plan: Plan, chosen: Sequence[Lever]) -> Options | None:
    """The plan's options with these levers; None where they do not go together."""
    try:
        return with_changes(plan.options, changes_of(chosen))
    except UserError:
        return None


def _as_resumed(plan: Plan, state: State) -> Options:
    """With the levers that the state's run had."""
    known = {**state.facts.harmless, **state.facts.configuration}
    changes = {}
    for lever in levers(plan):
        for name in lever.changes:
            if name in known and not lever.lacking:
                changes[name] = known[name]
    logger.info("--fit: the settings of %s hold for the resumed run", state.folder)
    return with_changes(plan.options, changes)
