"""Resumes from a state with other settings: weights and moments are the state's, settings are this run's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from library.training.run import Run
from library.training.snapshot import HOOKS

logger = logging.getLogger(__name__)

# Options that change the form of the optimizer's state
_KINDS = frozenset({"optimizer_type", "use_8bit_adam", "use_lion_optimizer", "optim_bits"})
_OURS = ("lr", "initial_lr", "name", "param_names", "lora_scale", "lora_plus_ratio")  # of groups, from any network

Settings = list[dict[str, Any]]


@contextmanager
def kept(run: Run, tensors: Mapping[str, Any], *, changed: Collection[str], step: int) -> Iterator[Collection[str]]:
    """A context to load the `tensors` of a state of step `step` in; after it rates and settings are this run's.

    `changed`: the differences, as `state.refuse_other_run` returns them; if there are none, this does nothing. Yields
    the parts of the state to leave out: the state of another optimizer cannot be used.
    """
    if not changed:
        yield ()
        return
    theirs = tensors.get(HOOKS) or {}
    adopted = [hook.name for hook in run.hooks if hook.adopt(theirs.get(hook.name), step=step)]
    optimizer = run.optimizer.optimizer  # accelerate's wrapper is around it
    settings = settings_of(optimizer)
    if "network_alpha" in changed:
        logger.warning("--network_alpha has no effect: the network of the state has its own")
    if _KINDS.isdisjoint(changed):
        yield adopted
    else:
        logger.warning("--resume_anyway: the optimizer differs from the state's: its moments are not used")
        yield [*adopted, "optimizer"]
    put_back(optimizer, settings)


def settings_of(optimizer: torch.optim.Optimizer) -> Settings:
    """The settings of the optimizer's groups, those in its signature, without values that it has computed since."""
    names = {*inspect.signature(type(optimizer)).parameters, *_OURS} - {"params"}
    return [{name: value for name, value in group.items() if name in names} for group in optimizer.param_groups]


def put_back(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Set these settings in the groups, after a state with others was loaded."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        if "initial_weight_decay" in group and "weight_decay" in own:  # the first value of a weight decay's curve
            group["initial_weight_decay"] = own["weight_decay"]
