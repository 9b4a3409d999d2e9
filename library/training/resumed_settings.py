"""What --resume_anyway changes: a state holds the settings of the groups of parameters (rate, weight decay, betas …) as
they were, and torch takes these; a run that is to go on otherwise must put in its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

Settings = Sequence[dict[str, Any]]  # one for each group of parameters


def of(optimizer: Any) -> Settings:
    """Those of an optimizer that has just been made. What else is in its groups is what it counts, and stays the
    state's. `optimizer`: accelerate's wrapper."""
    names = {*inspect.signature(type(optimizer.optimizer).__init__).parameters, "initial_lr"} - {"params"}
    return [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]


def put(settings: Settings, tensors: dict[str, Any]) -> None:
    """Into the `tensors` of a state. The rate stays where it is on its schedule, of another height."""
    groups = tensors["optimizer"]["param_groups"]
    for group, own in zip(groups, settings, strict=False):  # of another number: refused when they are loaded
        rate, then = group.get("lr"), group.get("initial_lr", group.get("lr"))
        group.update(own)
        if rate is not None and then:
            group["lr"] = rate * own.get("initial_lr", own["lr"]) / then
        if "initial_weight_decay" in group:  # of a weight decay that falls
            group["initial_weight_decay"] = own["weight_decay"]
    schedule = tensors.get("schedule") or {}
    if "base_lrs" in schedule:
        schedule["base_lrs"] = [group["initial_lr"] for group in groups]
