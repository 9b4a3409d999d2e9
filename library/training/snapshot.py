"""The tensors that training changes, as one table: for saved states, for a rollback and for the rate finder.

The core of the run is under "network", "optimizer", "scaler" and the keys of its losses, its hooks' parts under
"hooks", by their names.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.training import optimizer_state
from library.training.run import Run

logger = logging.getLogger(__name__)

Tensors = dict[str, Any]

HOOKS = "hooks"
UNMISSED = ("monitor", "divergences")  # hooks that no weight depends on: a state may lack their parts
_MISFITS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)  # of a table of another form


def tensors_of(run: Run) -> Tensors:
    """The tensors are the run's own: they change with the next step."""
    scaler = run.accelerator.scaler
    core = {
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    hooks = {hook.name: found for hook in run.hooks if (found := hook.state_dict())}
    return core | run.losses.state_dict() | {HOOKS: hooks}


def put(run: Run, tensors: Tensors, where: str, *, without: Collection[str] = ()) -> None:
    """Load these tensors into the run, except some parts ("optimizer", or a hook's name).

    `UserError`, beginning with `where`, if they do not fit.
    """
    for name in ("network", "optimizer"):
        if tensors.get(name) is None and name not in without:
            raise UserError(f"{where}: damaged: it has no {name}")
    core = {"network": run.network, "optimizer": run.optimizer, "scaler": run.accelerator.scaler}
    hooks, of_hooks = {hook.name: hook for hook in run.hooks}, tensors.get(HOOKS) or {}
    pairs = [(name, part, tensors.get(name)) for name, part in core.items()]
    pairs += [(name, hooks.get(name), of_hooks.get(name)) for name in (*hooks, *(of_hooks.keys() - hooks))]
    for name, part, saved in pairs:
        if name in without:
            continue
        if part is None or saved is None:
            if name not in UNMISSED and (saved is not None or (part is not None and part.state_dict())):
                has, lacks = ("run", "state") if saved is None else ("state", "run")
                logger.warning("--resume: the %s has no %s, the %s has one", lacks, name, has)
            continue
        try:
            part.load_state_dict(saved)
            if name == "optimizer" and not run.gradients.sharded and _same_types(run, tensors["network"]):
                optimizer_state.keep_types(run.optimizer.optimizer, saved)
        except _MISFITS as error:
            raise UserError(f"{where}: its {name} does not fit this run's: {error}") from None
    try:
        run.losses.load_state_dict(tensors)
    except _MISFITS as error:
        raise UserError(f"{where}: damaged: its losses are not lists of numbers ({error})") from None


def _same_types(run: Run, theirs: Mapping[str, Tensor]) -> bool:
    ours = run.network.state_dict()
    return all(ours[name].dtype == tensor.dtype for name, tensor in theirs.items() if name in ours)


def of_format_1(tensors: Tensors) -> Tensors:
    """Convert the first format, in which the hooks' parts stood beside the core's; a missing part was None."""
    places = {"schedule": "schedule", "validation": "validation", "average": "average", "meter": "monitor"}
    hooks = {name: tensors[place] for place, name in places.items() if tensors.get(place) is not None}
    if "divergences" in tensors:
        hooks["divergences"] = {"count": tensors["divergences"]}
    core = {name: part for name, part in tensors.items() if name not in (*places, "divergences")}
    return core | {HOOKS: hooks}
