"""The verdict of `--dry_run`: the memory that a run needs beside that of the card, and the effect of each lever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library import log
from library.errors import UserError
from library.guidance.card import Card, card_of
from library.guidance.levers import Lever, levers, with_changes
from library.guidance.moments import Estimator, Needs
from library.progress import progress
from library.units import human_bytes
from networks import kinds

if TYPE_CHECKING:
    from library.config.options import Options
    from library.optimizers.create import OptimizerChoice
    from library.run.plan import Plan

NOT_COMPUTED = "networks of other packages cannot be made without the model's weights"


@dataclass(frozen=True)
class Effect:
    """What a lever alone would change: `saved` bytes at the largest moment, of the whole run."""

    lever: Lever
    needs: Needs
    saved: int


def is_computable(plan: Plan) -> bool:
    """Whether the needs of this run can be computed: its network is one of our own."""
    network = plan.options.network
    return (
        plan.options.embedding.train_embedding_only
        or kinds.kind_of(network.network_module, network.network_args) is not None
    )


def estimator(plan: Plan) -> Estimator:
    """For the needs of this plan's run, and of the same with other options."""
    found: dict[tuple[object, object], OptimizerChoice] = {}

    def choose(options: Options) -> OptimizerChoice:
        key = (options.optimizer, options.custom_adamw)
        if key not in found:
            found[key] = _optimizer(plan, options)
        return found[key]

    return Estimator(plan, choose, on_gpu=card_of(plan.options) is not None)


def _optimizer(plan: Plan, options: Options) -> OptimizerChoice:
    from library.optimizers.create import choose_optimizer

    wanted = options.optimizer
    same = wanted == plan.options.optimizer and options.custom_adamw == plan.options.custom_adamw
    if same:
        return plan.choice
    with log.errors_only():
        return choose_optimizer(
            wanted.optimizer_name,
            wanted.optimizer_args,
            weight_decay=wanted.weight_decay,
            custom_adamw=options.custom_adamw.given(),
        )


def effects(plan: Plan, estimates: Estimator, now: Needs) -> list[Effect]:
    """The effect of each lever that can be set, the largest first."""
    found = []
    usable = [lever for lever in levers(plan) if not lever.lacking]
    with progress(usable, desc="options that need less", total=len(usable), unit="option", delay=2.0) as bar:
        for lever in bar:
            try:
                options = with_changes(plan.options, lever.changes)
            except UserError:  # not without another one: 8 bits need bf16
                continue
            needs = estimates.needs(options)
            found.append(Effect(lever, needs, now.largest.total - needs.largest.total))
    return sorted(found, key=lambda effect: -effect.saved)


def rows(plan: Plan, card: Card | None) -> Iterator[tuple[str, str]]:
    """The table as (label, text); a row without a label continues the one before."""
    estimates = estimator(plan)
    now = estimates.needs(plan.options)
    yield from _moments(now)
    yield "card", _verdict(now, card)
    found = effects(plan, estimates, now)
    helpful = [effect for effect in found if effect.saved > 0]
    for number, effect in enumerate(helpful):
        yield "less memory" * (not number), _effect(effect, card)
    idle = [effect.lever.words for effect in found if effect.saved <= 0]
    if idle:
        yield "" if helpful else "less memory", f"no effect on the largest moment: {', '.join(idle)}"
    for lever in levers(plan):
        if lever.lacking:
            yield "", f"{lever.words}: not for this run: {lever.lacking}"


def _moments(needs: Needs) -> Iterator[tuple[str, str]]:
    for number, moment in enumerate(sorted(needs.moments, key=lambda moment: -moment.total)):
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in moment.parts.items() if size)
        yield "memory" * (not number), f"{human_bytes(moment.total):>9}  {moment.name}: {parts}"
    if needs.host:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needs.host.items())
        yield "host memory", f"{human_bytes(sum(needs.host.values())):>9}  while it trains, pinned: {parts}"


def _verdict(needs: Needs, card: Card | None) -> str:
    """One sentence: whether it fits."""
    largest = needs.largest
    if card is None:
        return (
            f"there is no GPU here: the run needs {human_bytes(largest.total)} for tensors in {largest.name}; "
            "--gpu_memory 12GB compares that with a card"
        )
    left = card.usable - largest.total
    beside = "5 % are kept free" + (f", {human_bytes(card.context)} are CUDA's own" if card.context else "")
    if left >= 0:
        return f"{card}; it fits, with {human_bytes(left)} to spare ({beside})"
    return f"{card}; it does NOT fit: {human_bytes(-left)} are missing in {largest.name} ({beside})"


def _effect(effect: Effect, card: Card | None) -> str:
    time = f"{effect.lever.time:.2f} × the time of a step ({effect.lever.source})"
    fits = ""
    if card is not None:
        fits = ", then it fits" if effect.needs.largest.total <= card.usable else ", not enough alone"
    total = human_bytes(effect.needs.largest.total)
    return f"-{human_bytes(effect.saved)}, to {total}{fits}  {effect.lever.words}; {time}"


def best(plan: Plan, count: int = 3) -> Sequence[str]:
    """The words of the levers that save most, for an error of memory."""
    estimates = estimator(plan)
    found = effects(plan, estimates, estimates.needs(plan.options))
    return [
        f"{effect.lever.words} (needs {human_bytes(effect.saved)} less)"
        for effect in [effect for effect in found if effect.saved > 0][:count]
    ]
