"""The VAE of Wan and Qwen-Image: its original names and those of diffusers' AutoencoderKLQwenImage.

Original: Wan-Video/Wan2.1, wan/modules/vae.py. It is made for video; an image is a video of one frame. Names alone: no
weight is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.files.tensors import TensorEntry

MARK = "encoder.conv1.weight"
"""A name that a file in the original layout has."""
_OUTSIDE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
_RESNET = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_PER_UP_BLOCK = 4  # three residual layers and what enlarges


def vae_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """A VAE in either naming under diffusers' names. A name that no rule knows stays as it is."""
    if MARK not in entries:
        return dict(entries)
    found = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        found[f"{_path(path)}.{leaf}"] = entry
    return found


def _path(path: str) -> str:
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.([012])\.(.+)", path):
        return f"{match[1]}.mid_block.{_MIDDLE[match[2]]}.{_RESNET.get(match[3], match[3])}"
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", path):
        return f"encoder.down_blocks.{match[1]}.{_RESNET.get(match[2], match[2])}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", path):
        block, place = divmod(int(match[1]), _PER_UP_BLOCK)
        layer = "upsamplers.0" if place == _PER_UP_BLOCK - 1 else f"resnets.{place}"
        return f"decoder.up_blocks.{block}.{layer}.{_RESNET.get(match[2], match[2])}"
    return path
