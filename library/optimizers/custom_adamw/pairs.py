"""Finds the two halves of each LoRA pair: as their group declares them, or by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["down", "up", ""]

# kohya: X.lora_down.weight; peft: X.lora_A.default.weight, X.lora_embedding_A.default; diffusers: X.lora_A.weight,
# X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight; Tucker decomposition: X.lora_mid.weight
_NAME = re.compile(
    r"(?P<module>.*?)(?:^|[._])lora(?:_embedding|_linear_layer)?[._](?P<half>down|up|mid|A|B)(?P<rest>(?:\..*)?)"
)
_ROLES: dict[str, Role] = {"down": "down", "A": "down", "up": "up", "B": "up"}


def split(name: str) -> tuple[tuple[str, str], str]:
    """The part of a name that both halves of a pair share, and its half ("" for none): (("x", ".weight"), "up")."""
    match = _NAME.fullmatch(name)
    return ((match["module"], match["rest"]), match["half"]) if match else ((name, ""), "")


def role_of(name: str) -> Role:
    return _ROLES.get(split(name)[1], "")


def find_pairs(named: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
    """id(lora_up) → its lora_down, across groups. A pair with a middle tensor is left out: it is no plain product."""
    halves: dict[str, dict[tuple[str, str], Tensor]] = {"down": {}, "up": {}, "mid": {}}
    for name, parameter in named:
        module, half = split(name)
        if half and parameter.ndim >= 2:
            halves[_ROLES.get(half, half)][module] = parameter
    downs, mids = halves["down"], halves["mid"]
    return {
        id(up): downs[module]
        for module, up in halves["up"].items()
        if module in downs and module not in mids and fit(up, downs[module])
    }


class Halves:
    """The roles of all parameters. A group may declare those of its own: "roles", one for each parameter, and
    "partners", the lora_down of each lora_up or None. Other parameters are recognised by their names.

    Declared roles are removed from the groups, and so are in no state dict: each run declares its own.
    """

    def __init__(self) -> None:
        self._declared: dict[Tensor, tuple[Role, Tensor | None]] = {}

    def taken_from(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group without the roles that it declares. Raises ValueError unless there is one for each parameter."""
        if "roles" not in group:
            return group
        group = dict(group)
        roles, partners = group.pop("roles"), group.pop("partners")
        group["params"] = list(group["params"])
        self._declared |= zip(group["params"], zip(roles, partners, strict=True), strict=True)
        return group

    def role(self, name: str, parameter: Tensor) -> Role:
        declared = self._declared.get(parameter)
        return role_of(name) if declared is None else declared[0]

    def pairs(self, named: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
        """id(lora_up) → its lora_down, across groups."""
        named = list(named)
        found = find_pairs((name, parameter) for name, parameter in named if parameter not in self._declared)
        for _, parameter in named:
            _, down = self._declared.get(parameter, ("", None))
            if down is not None and fit(parameter, down):
                found[id(parameter)] = down
        return found


def fit(up: Tensor, down: Tensor) -> bool:
    """Whether lora_up (out, r, 1...) @ lora_down (r, in, ...), flattened to matrices, is the adapter's product."""
    same_rank = up.shape[1] == down.shape[0] and up.numel() == up.shape[0] * up.shape[1]
    return same_rank and up.device == down.device
