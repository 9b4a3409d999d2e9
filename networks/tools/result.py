"""Reading the sources of a tool, and writing its result with metadata that state what it was made from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from networks import base_weights, files
from networks.files import AdapterFile
from networks.lora import LoRA
from networks.tools.low_rank import KINDS, Factors, factors_of

logger = logging.getLogger(__name__)

MADE_FROM, MADE_BY = "ss_made_from", "ss_made_by"
# What other programs read of a base; the rest of a training's metadata is not that of a merged file
_OF_THE_BASE = ("ss_v2", "ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash")
_OF_THE_SPEC = (
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
)
_OLD_HASHES = ("modelspec.hash_sha256", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")
_DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read(paths: Sequence[Path], *, purpose: str, any_kind: bool = False) -> list[AdapterFile]:
    """The sources. `UserError` for other kinds than LoRA (unless `any_kind`), or LoRAs of several families."""
    found = [files.read(path, purpose=purpose, allowed=None if any_kind else KINDS) for path in paths]
    versions = {one.metadata["ss_base_model_version"]: one.source for one in found if _version(one)}
    if len(versions) > 1:
        words = ", ".join(f"{source} of {version}" for version, source in versions.items())
        raise UserError(f"these LoRAs are of different families: {words}")
    for key, noun in (
        ("ss_sd_model_hash", "base models"),
        (base_weights.KEY, "LoRAs merged into the base (--base_weights)"),
    ):
        values = {one.metadata.get(key, "") for one in found}
        if len(values) > 1:
            logger.warning("trained on different %s (%s): the result is of none of them exactly", noun, key)
    return found


def _version(file: AdapterFile) -> str:
    return file.metadata.get("ss_base_model_version", "").replace("None", "")


class _Factors(Mapping[str, Factors]):
    """The factors of each layer of a file, in fp32: formed when one is asked for, and not kept."""

    def __init__(self, file: AdapterFile) -> None:
        self._layers = file.layers

    def __getitem__(self, name: str) -> Factors:
        return factors_of(self._layers[name].tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers


def factors(file: AdapterFile) -> Mapping[str, Factors]:
    """The factors of each layer, by name; see `_Factors`."""
    return _Factors(file)


def common_metadata(sources: Sequence[AdapterFile]) -> dict[str, str]:
    """The metadata about the base in which all sources agree."""
    first = sources[0].metadata
    keys = [key for key in (*_OF_THE_BASE, *_OF_THE_SPEC, base_weights.KEY) if key in first]
    return {key: first[key] for key in keys if all(one.metadata.get(key) == first[key] for one in sources)}


def own_metadata(source: AdapterFile) -> dict[str, str]:
    """The metadata of one source, for a result that is still the same training's; without hashes of the old tensors."""
    return {key: text for key, text in source.metadata.items() if key not in _OLD_HASHES}


def about_ranks(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """`ss_network_*` of a plain LoRA; where ranks differ, "Dynamic", as kohya's resize_lora.py has it."""
    ranks = {LoRA.rank_of(own) for own in layers.values()}
    alphas = {float(own["alpha"]) for own in layers.values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def made_from(
    sources: Sequence[AdapterFile], weights: Sequence[object], method: str, *, blocks: Sequence[str] | None = None
) -> dict[str, str]:
    """The sources by name and hash of their tensors, the weight of each, those by block, and the method."""
    rows: list[dict[str, object]] = [
        {"name": Path(one.source).name, "weight": weight, "sshs_model_hash": _hash(Path(one.source))}
        for one, weight in zip(sources, weights, strict=True)
    ]
    for row, text in zip(rows, blocks or (), strict=blocks is not None):
        row["lbw"] = text
    names = ",".join(Path(one.source).stem for one in sources)
    return {MADE_FROM: json.dumps(rows), MADE_BY: method, "modelspec.merged_from": names}


def origins(metadata: Mapping[str, str]) -> list[str]:
    """What `made_from` has stated, in words, a line for each source; the text itself where it is of another form."""
    text = metadata.get(MADE_FROM, "[]")
    try:
        return [
            f"{row['name']} × {float(row['weight']):g}" + (f", by block {row['lbw']}" if "lbw" in row else "")
            for row in json.loads(text)
        ]
    except (KeyError, TypeError, ValueError, RecursionError):
        return [text]


def network_arguments(metadata: Mapping[str, str]) -> list[str]:
    """The network's arguments as "name=value"; none where the text is no JSON of this program's or kohya's form."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return []
    return [f"{name}={value}" for name, value in arguments.items()] if isinstance(arguments, dict) else []


def _hash(path: Path) -> str | None:
    """That of the file's metadata or, where it has none, of its tensors; None for pickled files."""
    if stated := read_metadata(path).get("sshs_model_hash"):
        return stated
    return safetensors_hashes(path)["sshs_model_hash"] if path.suffix == ".safetensors" else None


def precision(name: str | None, sources: Sequence[AdapterFile]) -> torch.dtype:
    """That of --save_precision; None: that of the sources, fp32 where they differ."""
    if name is not None:
        return _DTYPES[name]
    found = {tensor.dtype for one in sources for key, tensor in one.tensors.items() if not key.endswith(".alpha")}
    return found.pop() if len(found) == 1 else torch.float32


def write(
    path: Path, layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write the layers as `dtype`, alphas in fp32: bf16 has no 257. `UserError` for values that the type cannot hold,
    naming the tensor."""
    tensors = {}
    for name, own in layers.items():
        for end, tensor in own.items():
            cast = tensor.to(dtype) if tensor.is_floating_point() and end != "alpha" else tensor
            if cast.is_floating_point() and not cast.isfinite().all():
                words = f"up to {float(tensor.abs().max()):g}" if tensor.isfinite().all() else "NaN or infinity"
                raise UserError(
                    f"{path}: {name}.{end} has values {words}, which {str(cast.dtype).removeprefix('torch.')} does not "
                    "hold; give --save_precision float or bf16"
                )
            tensors[f"{name}.{end}"] = cast
    files.write(path, tensors, metadata)
    logger.info("%s: %d layers, %s", path, len(layers), str(dtype).removeprefix("torch."))
