"""A preset's numbers, for programs that make a `CustomAdamW` without the command line."""

from __future__ import annotations

from library.config.fields import convert, declared
from library.config.options import CustomAdamWOptions, declared_options
from library.config.options.weight_decay import WeightDecayOptions
from library.config.presets import settings_of
from library.config.registry import Arguments
from library.errors import UserError
from library.optimizers.create import choose_optimizer
from library.optimizers.registry import CUSTOM_ADAMW
from library.optimizers.task_rates import task_rate


def preset_arguments(
    *names: str, task: str | None = None, size: str | int | None = None, full: bool = False
) -> Arguments:
    """The arguments of `CustomAdamW` that these presets set, later ones winning: `lr`, `wd_transition_steps`, ...

    `task` and `size`, given together, set `lr` for a transformer instead of the presets', as `task_rate` has it: a task
    such as "generation", and the size of the base, "small", "medium", "large" or its number of parameters. `full`: all
    of its weights are trained. The presets' other settings (schedule, network, data) are left out: they are the
    caller's. Raises UserError for a name that is no preset, task or size, with the nearest one.
    """
    if (task is None) != (size is None) or (full and task is None):
        raise UserError("preset_arguments: task and size belong together, and full needs both")
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
    if task is not None and size is not None:
        return {**arguments, "lr": task_rate(task, size, full=full).rate}
    return arguments | ({"lr": values["learning_rate"]} if "learning_rate" in values else {})
