"""Makes an optimizer from its name and `key=value` words, with the behaviour that kohya's users expect of each name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from library.config import registry, source
from library.config.registry import Arguments
from library.errors import UserError, did_you_mean
from library.optimizers import small_lora
from library.optimizers.custom_adamw.options import decayed_weight_decay
from library.optimizers.groups import Options, ParameterGroups
from library.optimizers.registry import OPTIMIZERS
from library.optimizers.small_lora import SmallLora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer whose class is importable and whose arguments fit it.

    Its properties are read from the class, or from an instance for dummy parameters, not from its name or package.
    """

    name: str
    path: str
    arguments: Arguments

    @property
    def is_custom_adamw(self) -> bool:
        """Whether it is CustomAdamW, by any path, or a subclass of it."""
        return _is_custom_adamw(self.path)

    @property
    def has_modes(self) -> bool:
        """Whether its `train()` and `eval()` must be called around training."""
        return small_lora.has_modes(_class(self.path))

    @cached_property
    def averages(self) -> bool:
        """Whether the weights for saving, validation and sampling are its own average, apart from the trained ones."""
        return self.has_modes and small_lora.averages(self._on_dummies)

    @cached_property
    def schedule_free(self) -> bool:
        """Whether its average weights each step by its rate, which replaces a learning-rate schedule."""
        if not self.averages:
            return False
        lora = SmallLora({"unet": 1e-3})
        with small_lora.quietly():
            optimizer = self._on_dummies(lora.groups)
            small_lora.train(optimizer, lora)
        return "weight_sum" in optimizer.param_groups[0]

    @cached_property
    def finds_its_rate(self) -> bool:
        """Whether, as in D-Adaptation and Prodigy, the given rate is a factor, usually 1.0, on a "d" that it finds."""
        lora = SmallLora({"unet": None if self.takes_no_rate else 1e-3})
        with small_lora.quietly():
            return _has_found_d(_class(self.path), self._on_dummies(lora.groups).param_groups[0])

    @cached_property
    def has_a_rate_a_group(self) -> bool:
        """Whether each group has its own rate; most optimizers that find the rate use one for all."""
        return not self.finds_its_rate or small_lora.has_a_rate_a_group(self._on_dummies)

    @property
    def relative_step(self) -> bool:
        """Whether it is Adafactor in the mode that derives its rate from the step (kohya's default for it)."""
        return bool(self.setting("relative_step"))

    @property
    def takes_no_rate(self) -> bool:
        """Whether no rate may be given, as for transformers' Adafactor with relative steps; others ignore theirs."""
        return self.relative_step and _signature(self.path)["lr"].default is None

    def setting(self, name: str) -> object:
        """An argument as given, or its default; None if there is no such argument."""
        parameter = _signature(self.path).get(name)
        default = None if parameter is None or parameter.default is parameter.empty else parameter.default
        return self.arguments.get(name, default)

    def in_plain_steps(self) -> OptimizerChoice:
        """The same without slow preparations: CustomAdamW then compiles nothing."""
        if not self.is_custom_adamw:
            return self
        return replace(self, arguments={**self.arguments, "implementation": "eager", "is_paged": False})

    def _on_dummies(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        return _new(self.in_plain_steps(), _understood(self, groups), rate=None if self.takes_no_rate else 1e-3)


def choose_optimizer(
    name: str,
    words: Sequence[str],
    *,
    weight_decay: float | None = None,
    custom_adamw: Mapping[str, object] | None = None,
) -> OptimizerChoice:
    """Find the class and check the words against its signature.

    `name` is one of `OPTIMIZERS` (any case), a class of `torch.optim`, or a dotted path. `weight_decay`, and
    CustomAdamW's settings `custom_adamw`, were given as flags. Raises UserError, also if a flag and a word contradict
    each other.
    """
    path = _path(name)
    _refuse_no_optimizer(name, path)
    defaults = _defaults(path, name)
    ours = _is_custom_adamw(path)
    if custom_adamw:
        if not ours:
            flags = ", ".join(f"--{flag}" for flag in custom_adamw)
            raise UserError(f"{flags}: only CustomAdamW has this; --optimizer_type is {name}")
        words = _joined(words, custom_adamw)
    if weight_decay is not None:
        _refuse_no_weight_decay(name, path)
        words = _joined(words, {"weight_decay": weight_decay})
    # wd_flat is not a single word; --wd_flat sets it
    reserved = ("params", "lr", "wd_flat") if ours else ("params", "lr")
    arguments, unchecked = registry.bind(
        path, words, given=defaults, reserved=reserved, where="--optimizer_args", named_by="--optimizer_type"
    )
    if unchecked:
        logger.warning("--optimizer_args: %s takes any name, so these are not checked: %s", path, ", ".join(unchecked))
    arguments = {**defaults, **arguments}
    choice = OptimizerChoice(name, path, arguments)
    if choice.setting("warmup_init") and choice.setting("relative_step") is False:
        raise UserError(f"--optimizer_args: {name}'s warmup_init=True needs relative_step=True")
    with small_lora.quietly():  # invalid arguments fail now; messages about dummy parameters would mislead
        rate = None if choice.takes_no_rate else 1e-4
        _new(choice, _understood(choice, SmallLora({"unet": rate}).groups), rate=rate)
    return choice


def _refuse_no_optimizer(name: str, path: str) -> None:
    if path not in OPTIMIZERS.values():
        found = registry.load_path(path, where="--optimizer_type")
        if not (isinstance(found, type) and callable(getattr(found, "step", None))):
            raise UserError(f"--optimizer_type: {name} is no optimizer: a class with a step(), as those of torch.optim")


def _refuse_no_weight_decay(name: str, path: str) -> None:
    target = registry.signature(path, where="--optimizer_type")
    if "weight_decay" not in target.parameters:
        unchecked = "; --optimizer_args weight_decay=... passes it unchecked" if target.takes_any else ""
        raise UserError(f"--weight_decay: {name} has no weight_decay{unchecked}")


def _joined(words: Sequence[str], flags: Mapping[str, object]) -> list[str]:
    """The words and the flags, as words; a setting that is given twice with the same value appears once."""
    said = registry.parse_words(words, where="--optimizer_args")
    for flag, value in flags.items():
        if flag in said and said[flag] != value:
            raise UserError(f"--{flag} {value} contradicts --optimizer_args {flag}={said[flag]}: give one of them")
    return [*words, *(f"{flag}={value}" for flag, value in flags.items() if flag not in said)]


def _path(name: str) -> str:
    for known, path in OPTIMIZERS.items():
        if known.lower() == name.lower():
            return path
    if "." in name:
        return name
    if isinstance(getattr(torch.optim, name, None), type):
        return f"torch.optim.{name}"
    raise UserError(
        f"--optimizer_type: unknown optimizer '{name}'{did_you_mean(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}; "
        "any class of torch.optim; or a path such as package.module.Class"
    )


def _defaults(path: str, name: str) -> Arguments:
    """The defaults of kohya's scripts."""
    if name.lower().startswith("sgdnesterov"):
        return {"momentum": 0.9, "nesterov": True}
    if name.lower() == "adafactor":
        return {"relative_step": True}
    return {}


def _class(path: str) -> type:
    found: type = registry.load_path(path, where="--optimizer_type")
    return found


def _signature(path: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_class(path)).parameters


def _is_custom_adamw(path: str) -> bool:
    from library.optimizers.custom_adamw import CustomAdamW

    return issubclass(_class(path), CustomAdamW)


def create_optimizer(
    choice: OptimizerChoice, groups: ParameterGroups, *, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer over `groups` (dicts with "params", "lr" and "name").

    `learning_rate`: the rate of groups without one. Schedules that end at a certain rate compare it with this, so it
    should be the highest of the groups' rates.
    """
    groups = _understood(choice, groups)
    rates = {group.get("lr", learning_rate) for group in groups}
    rate: float | None = learning_rate
    if choice.finds_its_rate:
        if max(rates) <= 0.1:
            logger.warning(
                "%s finds the rate itself; the given one is a factor and should be near 1.0, not %g.",
                choice.name,
                max(rates),
            )
        if len(rates - {0.0}) > 1 and not choice.has_a_rate_a_group:
            first = next(group["lr"] for group in groups if group.get("lr"))
            logger.warning(
                "%s uses one rate for all parts: of %s the first one, %g, is used for all.",
                choice.name,
                ", ".join(f"{rate:g}" for rate in sorted(rates)),
                first,
            )
            groups = [{**group, "lr": first if group.get("lr", learning_rate) else 0.0} for group in groups]
    if choice.relative_step:
        logger.warning(
            "%s with relative_step=True derives its own rate: --learning_rate, --unet_lr and "
            "--text_encoder_lr have no effect. To use them: --optimizer_args relative_step=False.",
            choice.name,
        )
    if choice.takes_no_rate:
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        rate = None
    return _new(choice, groups, rate=rate)


def _understood(choice: OptimizerChoice, groups: ParameterGroups) -> ParameterGroups:
    """The groups; for other optimizers than CustomAdamW without the keys that only it understands."""
    if choice.is_custom_adamw:
        return groups
    of_lora = ("param_names", "lora_scale", "roles", "partners")
    return [{k: v for k, v in group.items() if k not in of_lora} for group in groups]


def _new(choice: OptimizerChoice, groups: ParameterGroups, *, rate: float | None) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = _class(choice.path)(groups, lr=rate, **choice.arguments)
    except UserError:
        raise
    except Exception as error:  # others' code, which refuses in its own ways
        if source.is_ours(choice.path) and not isinstance(error, TypeError | ValueError):
            raise
        raise UserError(f"--optimizer_type {choice.name} does not take these settings: {error}") from error
    return optimizer


@lru_cache
def _arguments_of(optimizer_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(optimizer_class).parameters)


def _has_found_d(optimizer_class: type, group: Options) -> bool:
    """Whether a group has a "d" that the optimizer has found: torch's Adafactor has an argument of that name."""
    return "d" in group and "d" not in _arguments_of(optimizer_class)


def effective_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate in force per group, by the group's name; with D-Adaptation and Prodigy, d times the rate."""
    rates = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = _relative_rate(optimizer, group) if group.get("relative_step") else group["lr"]
        factor = float(group["d"]) if _has_found_d(type(optimizer), group) else 1.0
        rates[str(group.get("name", f"group{index}"))] = float(rate) * factor
    return rates


def _relative_rate(optimizer: torch.optim.Optimizer, group: Options) -> float:
    """Adafactor's own rate in the last step, in transformers' version scaled by the first parameter's size."""
    state: Options = next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), {})
    step = state.get("step") or group.get("step")
    if not step:
        return 0.0
    if hasattr(optimizer, "_get_lr"):
        return float(optimizer._get_lr(group, state))
    return min(1e-6 * step if group.get("warmup_init") else 1e-2, step**-0.5)  # Shazeer & Stern 2018, section 8


def effective_weight_decays(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The weight decay of the last step per group, by the group's name; empty for an optimizer without one."""
    from library.optimizers.custom_adamw import CustomAdamW

    decays = {}
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" in group:
            own = isinstance(
                optimizer, CustomAdamW
            )  # its groups keep the first value; the curve is applied in each step
            decay = decayed_weight_decay(group, group["step"]) if own else float(group["weight_decay"])
            decays[str(group.get("name", f"group{index}"))] = decay
    return decays


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, measured after a step with zero gradients, which may change the weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tensor_bytes(optimizer.state)


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    return 0
