"""The transformer that FLUX.1, FLUX.2 and Chroma have in common: double and single blocks, and adapters on them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from library.models.blocks import Blocks
from library.models.checkpoints.flux_names import block_number, fused_name, fused_place, original_name
from library.models.flow_matching import FlowMatching

if TYPE_CHECKING:
    from torch import nn

    from library.files.json_text import Config
    from library.offload.swap import Block

_TRUE_SIZE = (19, 38)
LINEAR = re.compile(
    r"transformer_blocks\.\d+\.(?:norm1(?:_context)?\.linear|attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|"
    r"ff(?:_context)?\.net\.(?:0\.proj|2))|"
    r"single_transformer_blocks\.\d+\.(?:norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)"
)
"""All layers in the blocks of FLUX.1 and Chroma. Chroma has none in its norms."""
CHOICES = {
    "attn-only": re.compile(r"transformer_blocks\.\d+\.attn\..*|single_transformer_blocks\.\d+\.attn\..*"),
    "attn-qv": re.compile(r".*\.attn\.(?:to_[qv]|add_[qv]_proj)"),
}


class FluxBlocks(FlowMatching):
    """The common part of these families, which name the blocks' layers alike; FLUX.2 some of them otherwise."""

    _config: Config  # of the transformer

    def denoiser_blocks(self) -> list[nn.Module]:
        """The double blocks and the single ones."""
        transformer: Any = self.components["denoiser"]
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def swap_blocks(self) -> list[Block]:
        """Of a double block, which is twice as large as a single one, its attention and its MLPs by themselves."""
        from library.offload.swap import layers_in

        transformer: Any = self.components["denoiser"]
        found: list[Block] = []
        for block in transformer.transformer_blocks:
            found += [layers_in(block.norm1, block.norm1_context, block.attn), layers_in(block.ff, block.ff_context)]
        return [*found, *(layers_in(block) for block in transformer.single_transformer_blocks)]

    def blocks(self) -> Blocks:
        doubles, singles = self._config["num_layers"], self._config["num_single_layers"]

        def number(name: str) -> int | None:
            return block_number(name, doubles=doubles)

        return Blocks((("double", doubles), ("single", singles)), 0, number)

    @property
    def _has_true_size(self) -> bool:
        """Whether it has as many blocks as the published models."""
        return (self._config["num_layers"], self._config["num_single_layers"]) == _TRUE_SIZE

    def adapter_name(self, part: str, path: str) -> str:
        """The original names of the transformer's layers."""
        return original_name(path) if part == "denoiser" else super().adapter_name(part, path)

    def fused_name(self, part: str, name: str) -> str:
        return fused_name(name) if part == "denoiser" else ""

    def fused_place(self, part: str, name: str) -> int:
        return fused_place(name)
