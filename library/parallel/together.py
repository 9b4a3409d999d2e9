"""The settings that the processes of a run must agree on before they train together."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from library import processes
from library.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from library.training.state import Facts

T = TypeVar("T")


def patience(minutes: int | None) -> timedelta | None:
    """--ddp_timeout: how long a process waits for the others; None is torch's default."""
    return None if minutes is None else timedelta(minutes=minutes)


def agreed(value: T, *, timeout: timedelta | None) -> T:
    """The first process's value, in all processes; this starts the process group."""
    if not processes.are_several():
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env

    from library.parallel import shard

    with shard.without_accelerates_own():
        settings = {} if timeout is None else {"timeout": timeout}
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **settings)
        (first,) = broadcast_object_list([value])
    return first


def refuse_different(accelerator: Accelerator, facts: Facts) -> None:
    """UserError if another process has other data or options: they would wait forever, or train different networks.

    This can happen, because each machine reads its own files.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    mine = {"data": facts.data, "seed": facts.seed, "length in steps": facts.total_steps, **facts.configuration}
    for number, other in enumerate(gather_object([mine])):
        different = sorted(name for name in mine | other if mine.get(name) != other.get(name))
        if different:
            raise UserError(
                f"processes {accelerator.process_index} and {number} are not to train the same: {', '.join(different)} "
                "differ. Every machine needs the same command, images, captions and model"
            )


def same_start(accelerator: Accelerator, network: nn.Module) -> None:
    """Give all processes the first one's weights: those that are computed from the base may differ in their last bits
    from one kind of machine to another, and gradients are averaged on the same weights only."""
    if accelerator.num_processes > 1:
        import torch.distributed

        for tensor in network.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
