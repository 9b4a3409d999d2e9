"""The options of precision and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option, read_blocks
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="the precision to compute in; no means fp32")
    full_fp16: bool = option(False, help="keep all weights in fp16, including the trained ones and their gradients")
    full_bf16: bool = option(False, help="keep all weights in bf16, including the trained ones and their gradients")
    base_format: Literal["", "none", "fp8", "fp8_scaled", "int8", "nf4"] = option(
        "",
        help="hold the frozen weights of the layers that can be adapted in 8 bits (fp8, fp8_scaled, int8) or 4 (nf4); "
        "none: in 16 or 32, as they are computed with (default: none) (ours)",
    )
    text_encoder_format: Literal["", "none", "fp8", "fp8_scaled", "int8", "nf4"] = option(
        "",
        help="the same for the text encoders alone, also while they encode captions for a cache (default: as "
        "--base_format, and for a cache in 16 or 32) (ours)",
    )
    fp8_base: bool = option(
        False, help="hold the frozen weights of the layers that can be adapted in 8 bits (float8_e4m3fn)"
    )
    fp8_base_unet: bool = option(False, help="the same, for the UNet only")
    gradient_checkpointing: bool = option(False, help="recompute activations instead of storing them: less memory")
    cpu_offload_checkpointing: bool = option(
        False,
        help="keep what --gradient_checkpointing stores of the UNet in host memory; "
        "no effect where the device has no memory of its own",
    )
    blocks_to_swap: int | str | None = option(
        None,
        read=read_blocks,
        help="keep the frozen weights of this many of the UNet's blocks (or 50% of them) in host memory and copy them "
        "to the GPU ahead of their turn; no effect where the device has no memory of its own",
    )
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
        self._refuse_contradictions()
        if self.mixed_precision == "no" and (asked := self.formats.get("fp8")):
            raise UserError(f"--{asked} needs --mixed_precision bf16 or fp16, to compute in; the other formats do not")

    def _refuse_contradictions(self) -> None:
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            raise UserError("--cpu_offload_checkpointing needs --gradient_checkpointing, whose checkpoints it moves")
        if (self.fp8_base or self.fp8_base_unet) and self.base_format not in ("", "fp8"):
            raise UserError(
                f"--{self.unet_format_option} is --base_format fp8, and --base_format {self.base_format} is given: "
                "leave one out"
            )
        if self.fp8_base_unet and self.text_encoder_format not in ("", "none"):
            raise UserError(
                f"--fp8_base_unet leaves the text encoders as they are, and --text_encoder_format "
                f"{self.text_encoder_format} is given: leave one out"
            )

    @property
    def of_weights(self) -> str:
        """The option that keeps the trained weights in 16 bits, "" for fp32."""
        return "full_fp16" if self.full_fp16 else "full_bf16" if self.full_bf16 else ""

    @property
    def unet_format(self) -> str:
        """The format of quantization.FORMATS that the UNet's frozen weights are held in; "": as they are."""
        return "fp8" if self.fp8_base or self.fp8_base_unet else self.base_format.replace("none", "")

    @property
    def text_format(self) -> str:
        """The same of the text encoders."""
        if self.text_encoder_format:
            return self.encoding_format
        return "" if self.fp8_base_unet else self.unet_format

    @property
    def encoding_format(self) -> str:
        """The same while they encode captions for a cache, which must be asked for by name: what a format rounds is
        then in every cached caption."""
        return self.text_encoder_format.replace("none", "")

    @property
    def unet_format_option(self) -> str:
        """The given option that asks for `unet_format`, for messages, without "--"."""
        if self.fp8_base or self.fp8_base_unet:
            return "fp8_base" if self.fp8_base else "fp8_base_unet"
        return f"base_format {self.base_format}"

    @property
    def text_format_option(self) -> str:
        """The same of `text_format`."""
        own = self.text_encoder_format
        return f"text_encoder_format {own}" if own else self.unet_format_option

    @property
    def formats(self) -> dict[str, str]:
        """The formats that frozen weights are held in, each with the option that asks for it; empty without any."""
        found = {self.text_format: self.text_format_option, self.unet_format: self.unet_format_option}
        return {format: name for format, name in found.items() if format}
