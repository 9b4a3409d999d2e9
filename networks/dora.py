"""DoRA: LoRA with the length of each row of the weight trained apart from its direction. See networks/magnitude.py.

`--network_module networks.dora`, or `dora_wd=True` among LyCORIS' arguments; LoHa and LoKr take `dora_wd` as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from networks.lora import LoRA
from networks.settings import DecomposeSizes
from networks.settings import RankSettings as Settings


@dataclass(frozen=True, kw_only=True)
class Sizes(DecomposeSizes):
    """As LoRA's; decomposed unless `dora_wd=False`."""

    dora_wd: bool = True


class DoRA(LoRA):
    """The pair, and the norms of the input channels or, with `wd_on_output=True`, of the rows."""

    NAME = "dora"
    NOUN = "DoRA"
    READS = ("dora",)
    SETTINGS = Settings
    SIZES = Sizes
