"""The options of precision and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="the precision to compute in; no means fp32")
    full_fp16: bool = option(False, help="keep all weights in fp16, including the trained ones and their gradients")
    full_bf16: bool = option(False, help="keep all weights in bf16, including the trained ones and their gradients")
    fp8_base: bool = option(
        False, help="hold the frozen weights of the layers that can be adapted in 8 bits (float8_e4m3fn)"
    )
    fp8_base_unet: bool = option(False, help="the same, for the UNet only")
    gradient_checkpointing: bool = option(False, help="recompute activations instead of storing them: less memory")
    deterministic: bool = option(
        True, help="on an NVIDIA GPU, use only algorithms that give the same bits in every run (ours)"
    )
    allow_tf32: bool = option(
        False, help="on an NVIDIA GPU, let fp32 be computed in TF32: faster, with three digits instead of seven (ours)"
    )

    def __post_init__(self) -> None:
        for name, precision in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
            if getattr(self, name) and self.mixed_precision != precision:
                raise UserError(f"--{name} needs --mixed_precision {precision}, which is {self.mixed_precision}")
        if self.holds_unet_in_float8 and self.mixed_precision == "no":
            raise UserError(f"--{self.float8_option} needs --mixed_precision bf16 or fp16, to compute in")

    @property
    def of_weights(self) -> str:
        """The option that keeps the trained weights in 16 bits, "" for fp32."""
        return "full_fp16" if self.full_fp16 else "full_bf16" if self.full_bf16 else ""

    @property
    def float8_option(self) -> str:
        """The given option that holds weights in float8, for messages."""
        return "fp8_base" if self.fp8_base else "fp8_base_unet"

    @property
    def holds_unet_in_float8(self) -> bool:
        return self.fp8_base or self.fp8_base_unet

    @property
    def holds_text_encoders_in_float8(self) -> bool:
        return self.fp8_base and not self.fp8_base_unet
