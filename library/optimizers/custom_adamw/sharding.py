"""Refuses sharded parameters: a process has only a part of each, so that their steps would silently be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from library.errors import UserError

from ..groups import Group

Shapes = list[tuple[int, ...]]

# attributes of sharded parameters, by library; checked by name, so that none of these libraries is imported
_MARKS = {
    "_fsdp_flattened": "FSDP",  # torch FSDP1, flat parameters and the views into them
    "ds_id": "DeepSpeed ZeRO-3",
    "_hp_mapping": "DeepSpeed ZeRO",  # low-precision parameters whose masters are flat partitions
}


def kind_of(parameter: Tensor) -> str | None:
    """The library that sharded or flattened this parameter; None for an ordinary one."""
    names = {cls.__name__ for cls in type(parameter).__mro__}
    if "DTensor" in names:
        return "DTensor (FSDP2, tensor parallelism)"
    if "FlatParameter" in names:
        return "FSDP"
    return next((maker for mark, maker in _MARKS.items() if hasattr(parameter, mark)), None)


def refuse(parameter: Tensor, name: str, techniques: list[str]) -> None:
    """Raise `UserError` if `parameter` is sharded or flattened."""
    kind = kind_of(parameter)
    if kind is not None:
        raise UserError(complaint(f"{name} is sharded or flattened by {kind}", techniques))


def refuse_changed(groups: Sequence[Group], shapes: Sequence[Shapes], techniques: list[str]) -> None:
    """Raise `UserError` if parameters no longer have the shapes that the optimizer was made with: DeepSpeed ZeRO
    replaces them by flat partitions, FSDP shards them in place."""
    for number, (group, known) in enumerate(zip(groups, shapes, strict=True)):
        found = shapes_of(group)
        if found != known:
            changed = next(
                (f"{a} became {b}" for a, b in zip(known, found, strict=False) if a != b), "some are missing"
            )
            what = f"the parameters of group {number} were replaced or cut ({changed})"
            raise UserError(complaint(what, techniques))


def shapes_of(group: Group) -> Shapes:
    return [tuple(parameter.shape) for parameter in group["params"]]


def complaint(what: str, techniques: list[str]) -> str:
    needy = ", ".join(techniques) or "8-bit blocks"
    return (
        f"CustomAdamW: {what}. {needy} need whole tensors (norms, means and LoRA pairs of one parameter), and would "
        "silently compute something else on parts of them. Use DDP, or an optimizer that works element by element."
    )
