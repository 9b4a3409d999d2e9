"""From an optimizer's name and `key=value` words to the optimizer, with what kohya's users expect of each name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library import log
from library.config import registry
from library.errors import UserError, did_you_mean
from library.optimizers import CUSTOM_ADAMW, OPTIMIZERS
from library.optimizers.custom_adamw.options import decayed_weight_decay

logger = logging.getLogger(__name__)

ParameterGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer whose class is importable and whose arguments fit it; nothing is allocated yet."""

    name: str
    path: str
    arguments: dict[str, Any]

    @property
    def schedule_free(self) -> bool:
        """Its `train()` and `eval()` must be called around training, and it takes no learning-rate schedule."""
        return self.path.startswith("schedulefree.")

    @property
    def finds_its_rate(self) -> bool:
        """D-Adaptation and Prodigy: the given rate is a factor, 1.0 as a rule, and one for all groups."""
        return self.path.startswith(("dadaptation.", "prodigyopt."))

    @property
    def is_adafactor(self) -> bool:
        """transformers' Adafactor, or another of that name."""
        return self.path.endswith(".Adafactor")

    @property
    def relative_step(self) -> bool:
        """Adafactor in the mode that derives its rate from the step (kohya's default for it)."""
        return self.is_adafactor and bool(self.arguments.get("relative_step"))


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
    if custom_adamw:
        if path != CUSTOM_ADAMW:
            flags = ", ".join(f"--{flag}" for flag in custom_adamw)
            raise UserError(f"{flags}: only CustomAdamW has this; --optimizer_type is {name}")
        words = _joined(words, custom_adamw)
    if weight_decay is not None:
        _refuse_no_weight_decay(name, path)
        words = _joined(words, {"weight_decay": weight_decay})
    # wd_flat is no single word: --wd_flat gives it
    reserved = ("params", "lr", "wd_flat") if path == CUSTOM_ADAMW else ("params", "lr")
    arguments, unchecked = registry.bind(
        path, words, given=defaults, reserved=reserved, where="--optimizer_args", named_by="--optimizer_type"
    )
    if unchecked:
        logger.warning("--optimizer_args: %s takes any name, so these are not checked: %s", path, ", ".join(unchecked))
    arguments = {**defaults, **arguments}
    if path.endswith(".Adafactor") and arguments.get("warmup_init") and not arguments["relative_step"]:
        raise UserError("--optimizer_args: Adafactor's warmup_init=True needs relative_step=True")
    choice = OptimizerChoice(name, path, arguments)
    _rehearse(choice)
    return choice


def _rehearse(choice: OptimizerChoice) -> None:
    """Make it for nothing: what it refuses is refused now. What it says of a stand-in's numbers would mislead."""
    with log.errors_only():
        _new(choice, [torch.nn.Parameter(torch.zeros(2, 2))], rate=None if choice.relative_step else 1e-4)


def _refuse_no_optimizer(name: str, path: str) -> None:
    if path not in OPTIMIZERS.values():
        found = registry.load_path(path, where="--optimizer_type")
        if not (isinstance(found, type) and callable(getattr(found, "step", None))):
            raise UserError(f"--optimizer_type: {name} is no optimizer: a class with a step(), as those of torch.optim")


def _refuse_no_weight_decay(name: str, path: str) -> None:
    target = registry.signature(path, where="--optimizer_type")
    if "weight_decay" not in target.parameters:
        unchecked = "; --optimizer_args weight_decay=... hands it over unchecked" if target.takes_any else ""
        raise UserError(f"--weight_decay: {name} has no weight_decay{unchecked}")


def _joined(words: Sequence[str], flags: Mapping[str, object]) -> list[str]:
    """The words and the flags, as words; the same thing said twice is said once."""
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


def _defaults(path: str, name: str) -> dict[str, Any]:
    """What kohya sets where the user says nothing."""
    if name.lower().startswith("sgdnesterov"):
        return {"momentum": 0.9, "nesterov": True}
    if path.endswith(".Adafactor"):
        return {"relative_step": True}
    return {}


def create_optimizer(
    choice: OptimizerChoice, groups: ParameterGroups, *, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer over `groups` (dicts with "params", "lr" and "name").

    `learning_rate`: of groups without one; and what schedules that end at a certain rate compare that rate with, so it
    should be the highest of the groups' own.
    """
    if choice.path != CUSTOM_ADAMW:  # what only it understands
        groups = [{k: v for k, v in group.items() if k not in ("param_names", "lora_scale")} for group in groups]
    rates = {group.get("lr", learning_rate) for group in groups}
    rate: float | None = learning_rate
    if choice.finds_its_rate:
        if max(rates) <= 0.1:
            logger.warning(
                "%s finds the rate by itself; the one given is a factor and should be near 1.0, not %g.",
                choice.name,
                max(rates),
            )
        if len(rates - {0.0}) > 1:  # the packages refuse it, at the first step
            first = next(group["lr"] for group in groups if group.get("lr"))
            logger.warning(
                "%s uses one rate for all parts: of %s the first part's, %g, is taken for all.",
                choice.name,
                ", ".join(f"{rate:g}" for rate in sorted(rates)),
                first,
            )
            groups = [{**group, "lr": first if group.get("lr", learning_rate) else 0.0} for group in groups]
    if choice.relative_step:
        # With relative steps Adafactor insists on having no rate at all.
        logger.warning(
            "Adafactor with relative_step=True derives its own rate: --learning_rate, --unet_lr and "
            "--text_encoder_lr have no effect. To use them: --optimizer_args relative_step=False."
        )
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        rate = None
    return _new(choice, groups, rate=rate)


def _new(
    choice: OptimizerChoice, parameters: ParameterGroups | list[torch.nn.Parameter], *, rate: float | None
) -> torch.optim.Optimizer:
    optimizer_class = registry.load_path(choice.path, where="--optimizer_type")
    try:
        optimizer: torch.optim.Optimizer = optimizer_class(parameters, lr=rate, **choice.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_type {choice.name} does not take these settings: {error}") from error
    return optimizer


def effective_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate in force per group, by the group's name; with D-Adaptation and Prodigy, d times the rate."""
    rates = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = group["lr"]
        if rate is None:  # Adafactor with relative steps
            state = next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), None)
            rate = optimizer._get_lr(group, state) if state else 0.0
        rates[str(group.get("name", f"group{index}"))] = float(rate) * float(group.get("d", 1.0))
    return rates


def effective_weight_decays(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The weight decay of the last step per group, by the group's name; empty for an optimizer without one."""
    decays = {}
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" in group:
            own = "wd_schedule" in group  # CustomAdamW keeps the one it began with, and follows its curve in each step
            decay = decayed_weight_decay(group, group["step"]) if own else float(group["weight_decay"])
            decays[str(group.get("name", f"group{index}"))] = decay
    return decays


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the optimizer holds, measured after a step with gradients of zero: its weights may change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tensor_bytes(optimizer.state)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    return 0
