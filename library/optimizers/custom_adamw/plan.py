"""The assignment of parameters to rows of stacks: made at the first step, and again when anything has changed."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from library.errors import UserError, did_you_mean

from ..groups import Group, State
from . import batched as batching
from . import native, sharding
from .batched import Batched
from .options import Rates, Recipe, Recipes
from .pairs import Halves
from .stacks import Layout, Member, Stack, build, matrix_of, restart_incomplete
from .technique import About
from .techniques import names_on

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "native", "compiled", "eager"]


class Settings(NamedTuple):
    """The settings of the whole optimizer that are not part of its state dict."""

    optim_bits: Literal[8, 32]
    min_8bit_size: int
    is_paged: bool
    implementation: Implementation


class Item(NamedTuple):
    """One parameter in one step."""

    stack: int
    row: int
    grad: Tensor
    rates: Rates


class Place(NamedTuple):
    """The place of a parameter: its stack and row."""

    stack: int
    row: int


@dataclass
class Plan:
    """The assignment of parameters to stacks; valid until a parameter, its state or an option changes.

    `parameters`, `addresses`, `states` and `places` are parallel lists, in the order of the groups; parameters without
    a gradient so far have neither state nor place.
    """

    stacks: list[Stack]
    parameters: list[Tensor]
    addresses: list[int]
    states: list[State | None]
    places: list[Place | None]
    native: native.Native | None
    batched: dict[str, Batched]  # by type of device

    def covers(self, parameters: list[Tensor], grads: list[Tensor | None], state: Mapping[Tensor, State]) -> bool:
        """Whether the plan is still valid. A parameter that was moved, cast or replaced has another address."""
        return (
            len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and list(map(Tensor.data_ptr, parameters)) == self.addresses
            and all(map(is_, map(state.get, parameters), self.states))
            and not any(place is None and needs_place(g) for place, g in zip(self.places, grads, strict=True))
        )

    def step(self, items: list[Item]) -> None:
        """Run every item in its tier. A lora_up comes before its lora_down, because its factors need the old one."""
        ours = [item for item in items if self.stacks[item.stack].layout.native]
        batches: defaultdict[tuple[int, Rates], list[Item]] = defaultdict(list)
        for item in items:
            if not self.stacks[item.stack].layout.native:
                batches[item.stack, item.rates].append(item)
        for (number, rates), batch in batches.items():
            if self.stacks[number].layout.recipe.reads_down:
                self._step_batch(number, rates, batch)
        if ours and self.native is not None:
            self.native.step(ours)
        for (number, rates), batch in batches.items():
            if not self.stacks[number].layout.recipe.reads_down:
                self._step_batch(number, rates, batch)

    def _step_batch(self, number: int, rates: Rates, batch: list[Item]) -> None:
        stack = self.stacks[number]
        tier = self.batched[stack.layout.device.type]
        tier.step(stack, [item.row for item in batch], [item.grad for item in batch], rates)

    @property
    def tiers(self) -> list[str]:
        """The name of the tier that does the work, for messages."""
        names = ["native CPU kernel"] if self.native is not None else []
        names += sorted({"compiled" if tier.compiled else "plain torch operations" for tier in self.batched.values()})
        return names


def check_settings(
    optim_bits: Literal[8, 32], min_8bit_size: int, is_paged: bool, implementation: Implementation
) -> Settings:
    """Raises `UserError`."""
    if optim_bits not in (8, 32):
        raise UserError(f"CustomAdamW: optim_bits = {optim_bits!r}; it must be 8 or 32")
    choices = get_args(Implementation)
    if implementation not in choices:
        near = did_you_mean(str(implementation), choices)
        raise UserError(
            f"CustomAdamW: implementation = {implementation!r}; it must be one of {', '.join(choices)}{near}"
        )
    if implementation == "native":
        try:
            native.library()
        except native.Unavailable as reason:
            raise UserError(f"CustomAdamW: implementation = 'native': {reason}") from reason
    return Settings(optim_bits, min_8bit_size, is_paged, implementation)


def eight_bit(parameter: Tensor, settings: Settings) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    large = parameter.numel() >= settings.min_8bit_size
    return settings.optim_bits == 8 and large and parameter.dtype != torch.float64


def needs_place(grad: Tensor | None) -> bool:
    """Whether a parameter with this gradient is updated; empty ones are not."""
    return grad is not None and grad.numel() > 0


def named_parameters(groups: list[Group]) -> Iterator[tuple[str, Tensor, Group]]:
    """(name, parameter, its group); the name is "" if the groups have none."""
    for group in groups:
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            yield name, parameter, group


def make(groups: list[Group], state: Mapping[Tensor, State], settings: Settings, halves: Halves) -> Plan:
    """Stacks for all parameters that have a gradient or a state."""
    pairs = halves.pairs((name, parameter) for name, parameter, _ in named_parameters(groups))
    numbers = {id(group): number for number, group in enumerate(groups)}
    recipes = [Recipes(group) for group in groups]
    members: defaultdict[Layout, list[Member]] = defaultdict(list)
    for ordinal, (name, parameter, group) in enumerate(named_parameters(groups)):
        if parameter.numel() == 0 or (parameter.grad is None and parameter not in state):
            continue
        sharding.refuse(parameter, name or f"parameter {ordinal}", names_on(group))
        number, down = numbers[id(group)], pairs.get(id(parameter))
        recipe = recipes[number].of(
            About(halves.role(name, parameter), paired=down is not None, shape=tuple(parameter.shape))
        )
        down = down if recipe.reads_down else None
        members[_layout(number, parameter, recipe, down, settings)].append(
            Member(parameter, state[parameter], ordinal, down)
        )
    restarted = sum(
        restart_incomplete(layout.recipe, member.state) for layout, rows in members.items() for member in rows
    )
    if restarted:
        logger.warning(
            "CustomAdamW: the state of %d parameters has no second moment; their moments start again", restarted
        )
    stacks = [build(layout, rows, paged=settings.is_paged) for layout, rows in members.items()]
    kernel_stacks = {number: stack for number, stack in enumerate(stacks) if stack.layout.native}
    kernel = native.Native(kernel_stacks) if kernel_stacks else None
    others = {stack.layout.device.type for stack in stacks if not stack.layout.native}
    batched = {device: batching.tier(compiled=compiles(settings.implementation, device)) for device in others}
    places = {
        id(member.parameter): Place(number, row)
        for number, stack in enumerate(stacks)
        for row, member in enumerate(stack.members)
    }
    parameters = [parameter for _, parameter, _ in named_parameters(groups)]
    return Plan(
        stacks,
        parameters,
        addresses=list(map(Tensor.data_ptr, parameters)),
        states=list(map(state.get, parameters)),
        places=[places.get(id(parameter)) for parameter in parameters],
        native=kernel,
        batched=batched,
    )


def _layout(group: int, parameter: Tensor, recipe: Recipe, down: Tensor | None, settings: Settings) -> Layout:
    fits = all(native.suits(tensor, recipe) for tensor in (parameter, down) if tensor is not None)
    fits = fits and (down is None or down.dtype == parameter.dtype)
    return Layout(
        group=group,
        recipe=recipe,
        n=parameter.numel(),
        rank=0 if down is None else down.shape[0],
        down_size=0 if down is None else down.numel(),
        matrix=matrix_of(parameter) if recipe.reads_matrix else (0, 0),
        dtype=parameter.dtype,
        device=parameter.device,
        eight_bit=eight_bit(parameter, settings),
        native=fits and uses_kernel(settings.implementation),
    )


def uses_kernel(implementation: Implementation) -> bool:
    """Whether the CPU kernel is wanted and available. Raises `native.Unavailable` if it was requested by name."""
    if implementation not in ("auto", "native"):
        return False
    try:
        native.library()
    except native.Unavailable:
        if implementation == "native":
            raise
        return False
    return True


def compiles(implementation: Implementation, device: str) -> bool:
    """Whether to compile the batched step: on request, and by itself on CUDA with Triton."""
    if implementation == "auto":
        from torch.utils._triton import has_triton

        return device == "cuda" and has_triton()
    return implementation == "compiled"
