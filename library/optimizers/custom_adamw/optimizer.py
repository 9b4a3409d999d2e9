"""CustomAdamW as a `torch.optim.Optimizer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from library.errors import UserError

from ..groups import Group
from ..weight_decay import VANISHED
from . import checkpoint, plan, report, sharding, techniques
from .options import Rates, check_group, decayed_weight_decay, options_key, rates_of
from .paged import runtime as paging_runtime
from .pairs import Halves
from .techniques.dynamic_decay import plateau, waiting

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import Keywords

logger = logging.getLogger(__name__)


class CustomAdamW(Optimizer):
    """AdamW with published techniques, each with a switch, a weight decay that falls with the steps, and 8-bit state.

    `params`: parameters, named parameters (`model.named_parameters()`) or groups of either. LoRA pairs are found by
    name, across groups, or as a group declares them (`pairs.Halves`). A group may set any option below that is not
    marked (all), and `lora_scale` (alpha / rank) and `lora_plus_ratio` (LoRA+'s ratio, which its rate has in it
    already).

    lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; with everything off and 32 bits the results are its own,
        bit for bit. The CPU kernel rounds as torch's `fused` form does on a CPU with AVX2.
    optim_bits (all): 8 (block-wise, bitsandbytes' maps) or 32 for the two moments.
    min_8bit_size (all): parameters with fewer elements keep 32 bits.
    is_paged (all): moments in CUDA's unified memory.
    stochastic_rounding: for bfloat16 parameters, keyed by parameter and step.
    wd_flat (all): for wd_schedule "adaptive", which needs `observe`: the criterion of a flat loss
        (library/optimizers/plateau.py).
    implementation (all): "auto" uses the CPU kernel, the compiled or the plain step, whichever is available.
    percentile_clipping, block_wise, amsgrad: for old command lines only.

    The techniques' options: see `__init__`, docs/optimizer.md, and the file of each technique.

    Raises `UserError` for an unknown argument, a value out of range, sparse gradients and sharded parameters.
    """

    @techniques.with_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        optim_bits: Literal[8, 32] = 8,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        stochastic_rounding: bool = False,
        wd_flat: Mapping[str, float] | None = None,
        implementation: plan.Implementation = "auto",
        percentile_clipping: int | None = None,
        block_wise: bool | None = None,
        amsgrad: bool = False,
        **of_techniques: Unpack[Keywords],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            **techniques.defaults(of_techniques),
            "step": 0,
        }
        self._settings = plan.check_settings(optim_bits, min_8bit_size, is_paged, implementation)
        self._plateau = plateau(wd_flat)
        self._shapes: list[sharding.Shapes] = []
        self._halves = Halves()
        self._forget()
        self._warned_decay = self._told_tier = False
        super().__init__(params, defaults)
        _warn_of_old_arguments(percentile_clipping, block_wise, amsgrad)
        if is_paged and paging_runtime() is None:
            logger.warning("CustomAdamW: is_paged needs CUDA; the state stays in ordinary memory")
        report.announce(self.param_groups, self._settings, self._halves)

    # Groups and state

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(self._halves.taken_from(param_group))
        group = self.param_groups[-1]
        try:
            check_group(group)
            for name, parameter, _ in plan.named_parameters([group]):
                sharding.refuse(parameter, name or "a parameter", techniques.names_on(group))
                if parameter.is_complex():
                    raise UserError(f"CustomAdamW: {name or 'a parameter'} is complex; only real numbers are supported")
        except UserError:
            self.param_groups.pop()
            raise
        self._shapes.append(sharding.shapes_of(group))
        self._forget()

    def _forget(self) -> None:
        """Drop the plan, so that the next step makes a new one."""
        self._plan: plan.Plan | None = None
        self._planned: list[tuple[object, ...]] = []

    def __getstate__(self) -> dict[str, object]:
        own = ("_settings", "_plateau", "_shapes", "_halves", "_warned_decay", "_told_tier")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_halves", Halves())  # pickled by an earlier version, which knew names only
        checkpoint.unwrap(self.state)
        checkpoint.complete(self.param_groups, self.state, self.defaults)
        self._forget()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, but moments keep their dtype, and 32- and 8-bit states load into each other."""
        before = [dict(group) for group in self.param_groups]
        wrapping = self.register_load_state_dict_pre_hook(checkpoint.wrap)  # the last: other hooks see tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            wrapping.remove()
        checkpoint.tell(before, self.param_groups, self.state, self._settings)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step. `closure` recomputes the loss, with gradients enabled; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None and waiting(self.param_groups):
                self.observe(float(loss))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters]
        current = self._current_plan(parameters, grads)
        for group in self.param_groups:
            group["step"] += 1
        decays = [decayed_weight_decay(group, group["step"]) for group in self.param_groups]
        current.step(self._items(current, grads, decays))
        self._warn_of_decay(decays)
        return loss

    def observe(self, loss: float, gradient_norm: float | None = None, validation_loss: float | None = None) -> None:
        """Pass the loss to an "adaptive" weight decay, before each step; a step with a closure does it itself."""
        if adaptive := waiting(self.param_groups):
            self._plateau.tell(
                adaptive, counter="step", loss=loss, gradient_norm=gradient_norm, validation_loss=validation_loss
            )

    def _current_plan(self, parameters: list[Tensor], grads: list[Tensor | None]) -> plan.Plan:
        """The plan, made anew if a parameter, its state or an option has changed since the last step."""
        options = [options_key(group) for group in self.param_groups]
        if self._plan is None or options != self._planned or not self._plan.covers(parameters, grads, self.state):
            on = sorted({name for group in self.param_groups for name in techniques.names_on(group)})
            sharding.refuse_changed(self.param_groups, self._shapes, on)
            self._plan = plan.make(self.param_groups, self.state, self._settings, self._halves)
            self._planned = options
            if not self._told_tier:
                report.announce_tier(self._plan, self._settings)
                self._told_tier = True
        return self._plan

    def _items(self, current: plan.Plan, grads: list[Tensor | None], decays: list[float]) -> list[plan.Item]:
        """The parameters with a gradient, and their rates; counts the parameters' steps."""
        items = []
        everything = zip(grads, current.places, current.states, strict=True)
        for group, decay in zip(self.param_groups, decays, strict=True):
            known: dict[int, Rates] = {}
            for grad, place, state in islice(everything, len(group["params"])):
                if grad is None or place is None or state is None:
                    continue
                if grad.is_sparse:
                    raise UserError("CustomAdamW: a gradient is sparse; use dense gradients (sparse=False)")
                step = state["step"] = state["step"] + 1
                if step not in known:
                    known[step] = rates_of(group, step, decay)
                items.append(plan.Item(place.stack, place.row, grad, known[step]))
        return items

    def _warn_of_decay(self, decays: list[float]) -> None:
        """Warn once of a weight decay that has vanished, or of one that waits for losses without calls of `observe`."""
        if self._warned_decay:
            return
        if any(
            group["weight_decay"] > 0 and decay < VANISHED
            for group, decay in zip(self.param_groups, decays, strict=True)
        ):
            logger.warning("CustomAdamW: the weight decay has fallen below 1e-8: nothing is regularised any more")
            self._warned_decay = True
            return
        adaptive = waiting(self.param_groups)
        if adaptive and adaptive[0]["step"] == self._plateau.earliest and "wd_seen" not in adaptive[0]:
            logger.warning("CustomAdamW: wd_schedule='adaptive' needs the losses: call optimizer.observe(loss)")

    # Information

    def get_optimization_info(self) -> report.Information:
        """The techniques that are on, the LoRA pairs, bytes of state, the current weight decay, the step's tier."""
        return report.describe(self.param_groups, self._plan, self._settings, self._halves)

    def __repr__(self) -> str:
        return report.represent(self.param_groups, self._settings, self._halves)


def _warn_of_old_arguments(percentile_clipping: int | None, block_wise: bool | None, amsgrad: bool) -> None:
    given = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
    for name, value in given.items():
        if value is not None:
            logger.warning("CustomAdamW: %s = %r has no effect: bitsandbytes has removed it", name, value)
    if amsgrad:
        raise UserError("CustomAdamW: amsgrad=True is not supported")
