"""A run, the object that the training loop works on. `library/run/build.py` makes it; it is not changed afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from library.record.loss_history import LossHistory
from library.training.hook import Hook
from library.training.step import BatchLossOf, batch_loss

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from library.data.dataset import Batch, TrainingData
    from library.data.loader import PixelLoader
    from library.models.family import ModelFamily
    from library.optimizers.create import ParameterGroups
    from library.record.saves import SavePlan
    from library.training.gradients import Gradients
    from library.training.step import Objective
    from networks.network import TrainableNetwork

H = TypeVar("H")


class StepOptimizer(Protocol):
    """The wrapper of the optimizer: accelerate's, or the one that shards its state."""

    optimizer: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def step_was_skipped(self) -> bool: ...
    def step(self) -> None: ...
    def zero_grad(self, *, set_to_none: bool) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Position:
    """The position at which the loop starts: `done` of `total` steps, by earlier processes or before a rollback. The
    running loop counts further steps itself."""

    total: int
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """The core of a run, and its hooks in the order in which they are called.

    `groups`: the trained parameters with the rates as configured (a schedule changes those in the optimizer's groups);
    None if the optimizer sets its rates itself. `batch_loss`: the loss of a batch of `data`, for the objective.
    `dummy`: a batch with loss weight 0 for a process that has none left: under FSDP and ZeRO all processes must run the
    model equally often.
    """

    accelerator: Accelerator
    family: ModelFamily
    network: TrainableNetwork
    groups: ParameterGroups
    optimizer: StepOptimizer
    gradients: Gradients
    data: TrainingData
    loader: PixelLoader
    objective: Objective
    batch_loss: BatchLossOf = batch_loss
    train_text: bool
    seed: int
    accumulation: int
    saves: SavePlan
    position: Position
    losses: LossHistory = field(default_factory=LossHistory)
    dummy: Batch | None = None
    hooks: tuple[Hook[Run], ...] = ()

    def __post_init__(self) -> None:
        names = Counter(hook.name for hook in self.hooks)
        if wrong := [name for name, count in names.items() if count > 1 or not name]:
            raise ValueError(f"hooks need unique names: {wrong}")

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def hook(self, kind: type[H]) -> H | None:
        """The hook of this class; None if the run has none."""
        return next((hook for hook in self.hooks if isinstance(hook, kind)), None)

    @contextmanager
    def weights_for(self, purpose: str) -> Iterator[None]:
        """A context in which the network has the weights to "validate", "sample" or "save"."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.weights_for(self, purpose))
            yield
