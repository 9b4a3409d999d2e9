"""The options that need less memory: what each sets, what it costs in time, and where that figure is from.

The cost model of `--fit`: the time of a step is that of the run as configured times the factors of the levers that are
set. The factors are estimates, rounded; a card, a model and a resolution each have their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.options import option_groups
from library.data.captions import refuse_text_cache_of_changing_captions
from library.data.views import refuse_latent_cache_of_changing_images
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.options import Options
    from library.run.plan import Plan

Changes = Mapping[str, object]
"""Values of options by name."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A change of options that needs less memory.

    `axis`: of the levers of one axis at most one is set. `time`: the factor on the time of a step; `source`: where it
    is from. `is_last`: it changes what is trained, so `--fit` sets it only where nothing else fits. `lacking`: why it
    cannot be set; "" where it can.
    """

    axis: str
    changes: Changes
    time: float
    source: str
    is_last: bool = False
    lacking: str = ""

    @property
    def words(self) -> str:
        """The words of the command line."""
        return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in self.changes.items())


def with_changes(options: Options, changes: Changes) -> Options:
    """The options with these values; their places in `given` stay. Raises UserError where they do not fit together."""
    parts: dict[str, object] = {}
    for name, group in option_groups().items():
        own = {key: value for key, value in changes.items() if key in {f.name for f in dataclasses.fields(group)}}
        if own:
            parts[name] = dataclasses.replace(getattr(options, name), **own)
    return dataclasses.replace(options, **parts)  # type: ignore[arg-type]


def changes_of(levers: Iterable[Lever]) -> Changes:
    """What these set together."""
    return {name: value for lever in levers for name, value in lever.changes.items()}


def levers(plan: Plan) -> list[Lever]:
    """The levers that change this run, the cheapest first. Those that the user's own choices forbid are among them."""
    found = [_judged(lever, plan) for lever in _all(plan) if not _is_set(lever, plan.options)]
    return sorted(found, key=lambda lever: (lever.is_last, lever.time))


def _is_set(lever: Lever, options: Options) -> bool:
    values = {name: value for group in option_groups() for name, value in vars(getattr(options, group)).items()}
    return all(values[name] == value for name, value in lever.changes.items())


def _all(plan: Plan) -> Iterator[Lever]:
    """All of them, in the order of the documentation."""
    options = plan.options
    yield Lever(
        axis="latents", changes={"cache_latents": True}, time=0.95, source="the VAE's share of a step, estimated"
    )
    yield Lever(
        axis="precision",
        changes={"mixed_precision": "bf16"},
        time=0.55,
        source="measured on a CPU with bf16 instructions: 0.52 of fp32",
    )
    if _is_adamw(plan):
        yield Lever(axis="state", changes={"optimizer_type": "AdamW8bit"}, time=1.0, source="below 1 % of a step")
    if plan.choice.is_custom_adamw:
        yield Lever(axis="state", changes={"optim_bits": 8}, time=1.0, source="below 1 % of a step")
    yield Lever(axis="vae batch", changes={"vae_batch_size": 1}, time=1.0, source="before training only")
    for name, time, source in _FORMATS:
        yield Lever(axis="format", changes={"base_format": name}, time=time, source=source)
    yield Lever(
        axis="checkpointing",
        changes={"gradient_checkpointing": True},
        time=1.3,
        source="published: 20 to 30 % more",
    )
    size, accumulation = options.data.train_batch_size, options.training.gradient_accumulation_steps
    if size > 1:
        yield Lever(
            axis="batch",
            changes={"train_batch_size": 1, "gradient_accumulation_steps": accumulation * size},
            time=1.25,
            source="estimated: small batches use a GPU less well",
        )
    for share in (50, 90):
        yield Lever(
            axis="swapping",
            changes={"blocks_to_swap": f"{share}%"},
            time=1 + 0.15 * share / 100,
            source="estimated, a little above the published 4 to 11 % for all blocks, where copies overlap",
        )
    if options.embedding.is_trained:
        return  # texts cannot be cached while what they return is trained
    yield Lever(
        axis="text",
        changes={"network_train_unet_only": True, "cache_text_encoder_outputs": True},
        time=0.9,
        source="the text encoders' share of a step, estimated",
        is_last=True,
    )


_FORMATS = (
    ("fp8", 1.05, "estimated: a conversion before each product"),
    ("fp8_scaled", 1.08, "estimated: a conversion and a product before each product"),
    ("int8", 1.08, "estimated: a conversion and a product before each product"),
    ("nf4", 1.2, "estimated: a table of 16 values is read before each product"),
)


def _is_adamw(plan: Plan) -> bool:
    return plan.choice.path == "torch.optim.AdamW"


def _judged(lever: Lever, plan: Plan) -> Lever:
    """The lever, with the reason where it cannot be set."""
    return dataclasses.replace(lever, lacking=_lacking(lever, plan))


def _lacking(lever: Lever, plan: Plan) -> str:
    options = plan.options
    for name in lever.changes:
        place = options.given.get(_asking(name, options), "")
        if place and not is_preset(place):
            return f"{place} is given"
    if lever.axis == "batch" and plan.settings:
        return "--prompts_file has the batch sizes"
    if lever.axis == "batch" and any(spec.batch_size != options.data.train_batch_size for spec in plan.datasets):
        return "the data sets have batch sizes of their own"
    try:
        if lever.axis == "latents":
            refuse_latent_cache_of_changing_images(plan.datasets, option="cache_latents")
        if lever.axis == "text":
            refuse_text_cache_of_changing_captions(plan.datasets, option="cache_text_encoder_outputs")
    except UserError as error:
        return str(error)
    return ""


_SAME = {
    "optimizer_type": ("optimizer_type", "use_8bit_adam", "use_lion_optimizer"),
    "base_format": ("base_format", "fp8_base", "fp8_base_unet"),
    "cache_latents": ("cache_latents", "cache_latents_to_disk"),
    "network_train_unet_only": ("network_train_unet_only", "network_train_text_encoder_only", "text_encoder_lr"),
    "cache_text_encoder_outputs": ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
}
"""Options that decide the same."""


def _asking(name: str, options: Options) -> str:
    """The given one of the options that decide the same as `name`."""
    return next((other for other in _SAME.get(name, (name,)) if other in options.given), name)


def is_preset(place: str) -> bool:
    """Whether the place of a setting is in a preset of this program, which is no choice of the user's own."""
    from library.config.presets import presets

    return any(place.startswith(str(preset.path)) or preset.path.name in place for preset in presets().values())
