"""The options of the commands that compute with a base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """How the base model is computed"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="the precision to compute in; no means fp32")
    allow_tf32: bool = option(False, help="on an NVIDIA GPU, let fp32 be computed in TF32")
    zero_terminal_snr: bool = option(False, help="the base's noise schedule ends in pure noise")
