"""Shards the gradients and the optimizer's state over the processes by DeepSpeed's ZeRO-2, for large networks.

A DeepSpeed configuration of `accelerate launch` turns it on. Accelerate's own use of DeepSpeed steps inside `backward`,
before the gradient can be checked, so the engine is called from here: it reduces the gradients, keeps each process's
shard, and steps when `step` is called. (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.)

A saved state is that of one process, gathered from all shards, so that any number of processes can resume.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.config import registry
from library.config.registry import Arguments
from library.errors import UserError
from library.record.saves import SavePlan
from library.record.validation_history import Validation
from library.training.hook import Hook
from library.training.run import Run
from networks import kinds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.config.options import Options
    from library.optimizers.create import OptimizerChoice

logger = logging.getLogger(__name__)

OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers whose state is a number for each weight, so that they work on any part of the weights as one vector."""

ASKED = "ACCELERATE_USE_DEEPSPEED"
_BUCKET = 20_000_000  # the most gradients that are reduced at a time: a buffer of 80 MB


def is_asked_for() -> bool:
    """Whether the launcher's configuration is one of DeepSpeed."""
    return os.environ.get(ASKED, "false").lower() == "true"


def refuse_what_cannot_be(options: Options, choice: OptimizerChoice, network_arguments: Arguments) -> None:
    """UserError for settings of DeepSpeed's configuration beside ZeRO-2, and for options that do not work with it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate's configuration uses DeepSpeed, which is not installed: pip install deepspeed")
    for variable, key, allowed in (
        ("ZERO_STAGE", "zero_stage", ("2",)),
        ("OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", ("none",)),
        ("OFFLOAD_PARAM_DEVICE", "offload_param_device", ("none",)),
        ("CONFIG_FILE", "deepspeed_config_file", ("none",)),
    ):
        asked = os.environ.get(f"ACCELERATE_DEEPSPEED_{variable}", allowed[0])
        if asked.lower() not in allowed:
            raise UserError(
                f"accelerate's deepspeed_config: {key}: {asked}: only {allowed[0]} is possible; "
                "configs/accelerate/deepspeed_zero2.yaml has it"
            )
    module = options.network.network_module
    shared = registry.load_path(choice.path, where="--optimizer_type") in OPTIMIZERS
    for option, value, why in (
        ("optimizer_type", None if shared else choice.name, "only AdamW and Adam can be sharded"),
        ("network_module", kinds.refuses(module, "fsdp") and module, "only this program's kinds of adapters"),
        ("network_args module_dropout", network_arguments.get("module_dropout"), "all processes must train the same"),
        ("mixed_precision", options.precision.mixed_precision, "bf16 and no only"),
        ("full_fp16", options.precision.full_fp16, "the trained weights are fp32"),
        ("full_bf16", options.precision.full_bf16, "the trained weights are fp32"),
        ("scale_weight_norms", options.network.scale_weight_norms, "it changes weights beside the optimizer"),
        ("ewc_data", options.forgetting.ewc_data, "it adds to gradients that no process has whole"),
        ("find_lr", options.guidance.find_lr, "find the rate with one process"),
    ):
        fine = {"mixed_precision": ("no", "bf16")}.get(option, ())
        if value and value not in fine:
            raise UserError(f"--{option} {value} with DeepSpeed's ZeRO-2: {why}")


class ZeroTwo:
    """The optimizer of a run whose state and gradients are sharded, and its gradients (`training.gradients`).

    Every process must call `backward` equally often, `accumulation` times a step; and all processes must call `norm`,
    `step`, `gathered` and `state_dict` together.
    """

    sharded = True
    step_was_skipped = False  # there is no fp16

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        accumulation: int,
        max_grad_norm: float,
    ) -> None:
        import deepspeed

        self._shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
        self._accelerator, self._accumulation, self._micro_steps = accelerator, accumulation, 0
        self._gathered: dict[str, Any] | None = None
        numbers = sum(shape.numel() for shapes in self._shapes for shape in shapes)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # not used: the loss is already weighted
            "gradient_clipping": max_grad_norm,
            "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": min(numbers, _BUCKET)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        deepspeed.utils.logger.setLevel(logging.WARNING)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.optimizer = optimizer  # with one vector a group: this process's shard
        logger.info(
            "ZeRO-2: gradients and optimizer state of %d weights are sharded over %d processes, %d each",
            *(numbers, accelerator.num_processes, sum(group["params"][0].numel() for group in optimizer.param_groups)),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def backward(self, loss: Tensor) -> None:
        """Add the mean of all processes' gradients to this process's shard."""
        self._micro_steps += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_steps % self._accumulation == 0)
        self._engine.backward(loss, scale_wrt_gas=False)

    def average(self) -> None:
        """No-op: `backward` averages."""

    def clip(self) -> Tensor:
        """Returns the norm only; `step` clips."""
        return torch.tensor(self.norm())

    def norm(self) -> float:
        """The norm of the whole gradient of the step, before it is clipped; NaN if it is not finite."""
        norm = float(self._zero.scaled_global_norm())
        return norm if norm >= 0 else float("nan")  # DeepSpeed's -1 means infinite or NaN

    def step(self) -> None:
        """Clip, update this process's shard of the weights, and gather the others."""
        self._engine.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients, also of a skipped step."""
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in kept:
                kept[group] = None
        self._zero.zero_grad(set_to_none=set_to_none)

    # -- the state, in the form of a single process

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which the whole state is gathered, so that the first process can read it without the others."""
        self._gathered = self._whole()
        try:
            yield
        finally:
            self._gathered = None

    def state_dict(self) -> dict[str, Any]:
        return self._whole() if self._gathered is None else self._gathered

    def _whole(self) -> dict[str, Any]:
        state: dict[int, dict[str, Tensor]] = {}
        groups = []
        for group, shapes in zip(self.optimizer.param_groups, self._shapes, strict=True):
            numbers = range(len(state), len(state) + len(shapes))
            groups.append({**group, "params": list(numbers)})
            shares = self.optimizer.state.get(group["params"][0], {})
            parts = {name: self._parts(share, shapes) for name, share in shares.items()}
            state |= {number: {name: of[i] for name, of in parts.items()} for i, number in enumerate(numbers)}
        return {"state": {number: entry for number, entry in state.items() if entry}, "param_groups": groups}

    def _parts(self, share: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The state of each parameter, joined from the shards of all processes; single numbers are the same in all."""
        if not share.dim():
            return [share.clone() for _ in shapes]
        sizes = [shape.numel() for shape in shapes]
        whole = self._accelerator.gather(share).cpu()[: sum(sizes)]  # the last shard is padded
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load this process's shard, after the network's weights. Raises ValueError if it does not fit."""
        groups = self.optimizer.param_groups
        if [len(group["params"]) for group in saved["param_groups"]] != [len(shapes) for shapes in self._shapes]:
            raise ValueError("its parameters are others")
        rank = self._accelerator.process_index
        self._zero.refresh_fp32_params()
        for group, before in zip(groups, saved["param_groups"], strict=True):
            (share,) = group["params"]
            group.update({name: value for name, value in before.items() if name != "params"})
            entries = [saved["state"].get(number, {}) for number in before["params"]]
            self.optimizer.state.pop(share, None)
            for name, first in entries[0].items():
                value = first.clone()
                if first.dim():
                    flat = torch.cat([entry[name].reshape(-1) for entry in entries])
                    flat = nn.functional.pad(flat, (0, share.numel() * self._accelerator.num_processes - len(flat)))
                    value = flat[rank * share.numel() : (rank + 1) * share.numel()].to(share)
                self.optimizer.state[share][name] = value


def share_out(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    accumulation: int,
    max_grad_norm: float,
) -> ZeroTwo | None:
    """Shard the optimizer. None if there is only one process."""
    if accelerator.num_processes == 1:
        logger.warning("DeepSpeed with one process: there is nothing to shard, so it is not used")
        return None
    return ZeroTwo(network, optimizer, accelerator, accumulation=accumulation, max_grad_norm=max_grad_norm)


class Gathering(Hook[Run]):
    """Calls the main process's saver, with the whole optimizer state gathered whenever it writes a state."""

    name = "gathering"

    def __init__(self, saver: Hook[Run] | None, zero: ZeroTwo, saves: SavePlan) -> None:
        """`saver`: None on all processes except the main one."""
        self._saver, self._zero, self._saves = saver, zero, saves

    def resumed(self, run: Run) -> None:
        if self._saver is not None:
            self._saver.resumed(run)

    def save(self, run: Run, step: int, *, last: bool) -> None:
        with self._zero.gathered() if any(due.state for due in self._saves.due(step, last=last)) else nullcontext():
            if self._saver is not None:
                self._saver.save(run, step, last=last)

    def save_now(self, run: Run, step: int) -> None:
        with self._zero.gathered():
            if self._saver is not None:
                self._saver.save_now(run, step)

    def validated(self, run: Run, result: Validation, *, best: bool) -> None:
        if self._saver is not None:
            self._saver.validated(run, result, best=best)
