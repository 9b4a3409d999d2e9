"""Going on from a state with other settings: what was learnt is the state's, what is asked for is this run's."""

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

# What makes the state of the optimizer another one
_KINDS = frozenset({"optimizer_type", "use_8bit_adam", "use_lion_optimizer", "optim_bits"})
_OURS = ("lr", "initial_lr", "name", "param_names", "lora_scale", "lora_plus_ratio")  # of groups, from any network

Settings = list[dict[str, Any]]


@contextmanager
def kept(run: Run, tensors: Mapping[str, Any], *, changed: Collection[str], step: int) -> Iterator[Collection[str]]:
    """A context to put the `tensors` of a state of step `step` in place, after which rates and settings are the run's.

    `changed`: what is not as it was, as `state.refuse_other_run` returns it; nothing is kept if that is nothing.
    Yields the parts of the state to leave out: an optimizer of another kind begins anew.
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
        logger.warning("--resume_anyway: the optimizer is another one: what it had learnt of the gradients is lost")
        yield [*adopted, "optimizer"]
    put_back(optimizer, settings)


def settings_of(optimizer: torch.optim.Optimizer) -> Settings:
    """The settings that its groups were made with, by the optimizer's signature, without what it has counted since."""
    names = {*inspect.signature(type(optimizer)).parameters, *_OURS} - {"params"}
    return [{name: value for name, value in group.items() if name in names} for group in optimizer.param_groups]


def put_back(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Give the groups these settings, after a state with others was loaded."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        if "initial_weight_decay" in group and "weight_decay" in own:  # what a curve of the weight decay begins with
            group["initial_weight_decay"] = own["weight_decay"]
