"""CustomAdamW's options: a few of its own, and those that its techniques declare."""

from __future__ import annotations

from dataclasses import dataclass

from library.config import registry
from library.config.fields import declared, option
from library.config.options.weight_decay import WeightDecayOptions

_TECHNIQUES = "library.optimizers.custom_adamw.techniques.arguments"


def _with_settings_of_techniques(group: type) -> type:
    """Decorator: adds a field for each setting, except the weight decay's: those are options of all optimizers."""
    elsewhere = declared(WeightDecayOptions)
    for name, item in registry.load_path(_TECHNIQUES, where="CustomAdamW")().items():
        if name in elsewhere:
            continue
        group.__annotations__[name] = item.hint | None
        field = option(
            None,
            help=f"{item.help} (default: {item.shown})",
            # the technique's own check refuses a bound that is excluded
            minimum=item.above if item.minimum is None else item.minimum,
            maximum=item.below if item.maximum is None else item.maximum,
        )
        setattr(group, name, field)
    return group


@dataclass(frozen=True, kw_only=True)
@_with_settings_of_techniques
class CustomAdamWOptions:
    """CustomAdamW's own settings (--optimizer_type CustomAdamW; each can stand in --optimizer_args as well)"""

    optim_bits: int | None = option(None, help="bits of the optimizer's state, 8 or 32 (default: 8)")
    min_8bit_size: int | None = option(None, minimum=0, help="smaller tensors keep 32 bits (default: 4096)")
    is_paged: bool | None = option(None, help="keep the state in CUDA's paged memory (default: off)")

    def given(self) -> dict[str, object]:
        """What the user set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}
