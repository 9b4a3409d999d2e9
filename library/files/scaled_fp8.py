"""fp8 weights that mean something only together with a scale beside each, as ComfyUI writes them. No weight is read.

A weight is its numbers in the file times one number: `layer.scale_weight`, in files with a tensor `scaled_fp8`, or
`layer.weight_scale`, in newer ones (ComfyUI, QUANTIZATION.md). Scales of a layer's input, which are for products in
fp8, and what marks such files are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from library.errors import UserError
from library.files.tensors import TensorEntry

_SCALES = (".scale_weight", ".weight_scale")
_LEFT_OUT = (".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_OTHERS = (".weight_scale_2", ".pre_quant_scale")  # of formats that are more than a factor


def with_scales(path: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The table of a file, in which each weight that has a scale carries it.

    path: of the file, in errors. UserError for weights that are packed in another way.
    """
    found: dict[str, TensorEntry] = {}
    scales: dict[str, tuple[str, TensorEntry]] = {}  # by the weight's name, with their own
    for name, entry in entries.items():
        if name.endswith(_OTHERS):
            raise _refusal(path, name)
        layer, dot, end = name.rpartition(".")
        if dot + end in _SCALES:
            scales[f"{layer}.weight"] = name, entry
        elif not name.endswith(_LEFT_OUT) and end != _MARK:
            found[name] = entry
    for weight, (name, scale) in scales.items():
        if weight not in found:
            found[name] = scale  # a name that no module has: the loader reports it
            continue
        if scale.count != 1 or "float" not in scale.dtype or "float" not in found[weight].dtype:
            raise _refusal(path, name)
        found[weight] = replace(found[weight], scale=scale)
    return found


def _refusal(path: str, name: str) -> UserError:
    return UserError(
        f"{path}: '{name}' belongs to a packed weight, which is not supported; bf16, fp16, fp8 and fp8 with one scale "
        "for each weight are"
    )
