"""A preset's numbers, for programs that make a `CustomAdamW` without the command line."""

from __future__ import annotations

from library.config.fields import convert, declared
from library.config.options import CustomAdamWOptions, declared_options
from library.config.options.weight_decay import WeightDecayOptions
from library.config.presets import settings_of
from library.config.registry import Arguments
from library.optimizers.create import choose_optimizer
from library.optimizers.registry import CUSTOM_ADAMW


def preset_arguments(*names: str) -> Arguments:
    """The arguments of `CustomAdamW` that these presets set, later ones winning: `lr`, `wd_transition_steps`, ...

    Their other settings (schedule, network, data) are left out: they are the caller's. Raises UserError for a name that
    is no preset, with the nearest one.
    """
    options = declared_options()
    settings = settings_of(names, where="preset_arguments")
    values = {setting.name: convert(options[setting.name], setting.words) for setting in settings}
    flags = {name: values[name] for name in declared(CustomAdamWOptions) if name in values}
    curve = {name: values[name] for name in declared(WeightDecayOptions) if name in values}
    words, decay = values.get("optimizer_args", ()), values.get("weight_decay")
    assert isinstance(words, tuple), "as its option declares it"
    assert decay is None or isinstance(decay, float), "likewise"
    chosen = choose_optimizer(CUSTOM_ADAMW, words, weight_decay=decay, custom_adamw=flags)
    arguments = {**chosen.arguments, **curve}
    return arguments | ({"lr": values["learning_rate"]} if "learning_rate" in values else {})
