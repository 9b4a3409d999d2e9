"""The techniques of CustomAdamW, and settings derived from them. Imports no torch, because `--help` reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from pkgutil import resolve_name
from typing import TypeVar

from library.errors import UserError, did_you_mean

from ...groups import Options
from ..setting import Setting
from ..technique import STAGES, Technique

TECHNIQUES = {  # its switch: its class. In each stage of a step (update.py) they come in this order
    # the gradient
    "use_agr": "library.optimizers.custom_adamw.techniques.agr.AGR",
    "use_orthogonal_grad": "library.optimizers.custom_adamw.techniques.orthograd.OrthoGrad",
    # the input of the momentum
    "use_adopt_stability": "library.optimizers.custom_adamw.techniques.adopt.ADOPT",
    "use_tam": "library.optimizers.custom_adamw.techniques.tam.TAM",
    # what the momentum passes on, and the direction of the update
    "orthogonalize": "library.optimizers.custom_adamw.techniques.orthogonalize.Orthogonalize",
    "use_grams": "library.optimizers.custom_adamw.techniques.grams.Grams",
    "use_cautious": "library.optimizers.custom_adamw.techniques.cautious.Cautious",
    # its size
    "use_alora": "library.optimizers.custom_adamw.techniques.alora.ALoRA",
    # weight decay, and constraints on the weights
    "dynamic_weight_decay": "library.optimizers.custom_adamw.techniques.dynamic_decay.DynamicWeightDecay",
    "use_spd": "library.optimizers.custom_adamw.techniques.spd.SPD",
}


@lru_cache
def techniques() -> tuple[type[Technique], ...]:
    """Their classes."""
    kinds = tuple(resolve_name(path) for path in TECHNIQUES.values())
    switches = [kind.switch().name for kind in kinds]
    assert switches == list(TECHNIQUES), f"the first setting of a technique is its switch: {switches}"
    return kinds


@lru_cache
def settings() -> dict[str, Setting]:
    """The settings of all techniques by name."""
    found = [item for kind in techniques() for item in kind.settings()]
    names = [item.name for item in found]
    assert len(names) == len(set(names)), f"two techniques have a setting of the same name: {sorted(names)}"
    return {item.name: item for item in found}


@lru_cache
def arguments() -> dict[str, Setting]:
    """The settings that the constructor takes, by name."""
    return {name: item for name, item in settings().items() if not item.of_group}


def defaults(given: Mapping[str, object]) -> dict[str, object]:
    """All settings of a parameter group: those given to the constructor, else as declared. Raises `UserError`."""
    for name in given:
        if name not in arguments():
            raise UserError(f"CustomAdamW: there is no argument '{name}'{did_you_mean(name, arguments())}")
    return {name: given.get(name, item.default) for name, item in settings().items()}


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def with_arguments(constructor: Constructor) -> Constructor:
    """Decorator: `inspect.signature` and `help` show the techniques' arguments in place of the constructor's `**`."""
    signature = inspect.signature(constructor)
    *own, _ = signature.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, kind, default=item.default, annotation=item.annotation)
        for name, item in arguments().items()
    ]
    constructor.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    lines = (f"{name}: {item.help} (default: {item.shown})" for name, item in arguments().items())
    constructor.__doc__ = "\n".join(("The techniques' arguments:\n", *lines))
    return constructor


@lru_cache
def acting_at(*stages: str) -> tuple[type[Technique], ...]:
    """Those that act at one of these stages of a step."""
    return tuple(kind for kind in techniques() if kind.acts_at(*stages))


@lru_cache
def for_tensors() -> tuple[str, ...]:
    """The settings on which the steps of a group's tensors depend."""
    return tuple(item.name for kind in acting_at(*STAGES) for item in kind.settings())


def switched_on(group: Options) -> list[Technique]:
    """The techniques that a group has switched on, with its settings."""
    return [kind.of(group) for kind in techniques() if group[kind.switch().name]]


def names_on(group: Options) -> list[str]:
    """The names of the techniques that a group has on."""
    return [kind.name for kind in techniques() if group[kind.switch().name]]


def acting(group: Options) -> list[Technique]:
    """The techniques of a group that work on tensors, without those that others exclude."""
    on = [kind.of(group) for kind in acting_at(*STAGES) if group[kind.switch().name]]
    excluded = {option for technique in on for option in technique.excludes}
    return [technique for technique in on if technique.switch().name not in excluded]


@lru_cache
def _decaying() -> tuple[tuple[str, type[Technique]], ...]:
    return tuple((kind.switch().name, kind) for kind in acting_at("decay_factor"))


def decay_factor(group: Options, step: int) -> float:
    """The factor of a group's weight decay at its `step`-th step."""
    factor = 1.0
    for switch, kind in _decaying():
        if group[switch]:
            factor *= kind.of(group).decay_factor(max(step, 1))
    return factor


def check(group: Options) -> None:
    """Raise `UserError` for the first setting of a group that cannot be used."""
    for kind in techniques():
        for item in kind.settings():
            item.check(group[item.name])
        kind.of(group).check()
