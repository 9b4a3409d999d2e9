"""Show what a file holds: kind, sizes, training, norms by block, and its training settings as a TOML.

python -m networks.tools inspect fox.safetensors
python -m networks.tools inspect fox.safetensors --toml fox.toml

The TOML has the settings that the file's metadata state, for train_network.py --config_file. Paths are not in the
metadata: the base model, the images and the output folder stand there as comments to be completed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import BadValue, Declared, convert, option
from library.config.toml_file import toml_text
from networks.tools.blocks import block_of, order
from networks.tools.output import check_output

if TYPE_CHECKING:
    from networks.files import AdapterFile

# (label, key of the metadata), in the order of the report
_WORDS = (
    ("base model", "ss_sd_model_name"),
    ("family", "ss_base_model_version"),
    ("network", "ss_network_module"),
    ("steps", "ss_steps"),
    ("epoch", "ss_epoch"),
    ("images", "ss_num_train_images"),
    ("optimizer", "ss_optimizer"),
    ("learning rate", "ss_learning_rate"),
    ("schedule", "ss_lr_scheduler"),
    ("seed", "ss_seed"),
    ("comment", "ss_training_comment"),
    ("made by", "ss_made_by"),
)
_OPTIMIZER = re.compile(r"(?P<type>[\w.]+)(?:\((?P<arguments>.*)\))?", re.DOTALL)
# These are read below, or name files and folders without their paths
_NOT_SETTINGS = (
    *("ss_output_name", "ss_network_args", "ss_network_dim", "ss_network_alpha"),
    *("ss_base_weights", "ss_ewc_data", "ss_ewc_images"),
)


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is written"""

    toml: Path | None = option(None, help="write the training settings into this .toml")
    overwrite: bool = option(False, help="replace that file where it exists")


COMMAND = Command(
    name="lora-tools inspect",
    description=__doc__,
    groups={"inspect": InspectOptions},
    words=(Word("FILE", "the adapter file"),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    from library.files.atomic import replacing
    from networks import files

    options: InspectOptions = given.groups["inspect"]
    path = Path(given.words[0])
    if options.toml is not None:
        check_output(options.toml, [path], overwrite=options.overwrite, option="--toml", end=".toml")
    file = files.read(path, keep_embeddings=True)
    print("\n".join(report(file)))
    if options.toml is not None:
        with replacing(options.toml) as beside:
            beside.write_text(settings_toml(file.metadata), encoding="utf-8")
    return 0


def report(file: AdapterFile) -> list[str]:
    """Lines: metadata in words, and the norms of each block."""
    from library.models.checkpoints.adapter_file import short_title
    from library.record import protections, summary
    from networks import base_weights
    from networks.tools.result import network_arguments, origins

    kinds = sorted({layer.kind for layer in file.layers.values()})
    titles = ", ".join(short_title(kind) or "an unknown kind" for kind in kinds)
    lines = [f"{file.source}: {titles}, {len(file.layers)} layers, names in {file.naming or 'nobody'}'s style"]
    for label, key in _WORDS:
        if (text := file.metadata.get(key, "None")) not in ("None", ""):
            lines.append(f"{label:<14}{text}")
    if arguments := network_arguments(file.metadata):
        lines.append(f"{'arguments':<14}{', '.join(arguments)}")
    lines += [f"{'made from':<14}{words}" for words in origins(file.metadata)]
    if trained_on := base_weights.in_metadata(file.metadata):
        lines.append(f"{'on top of':<14}{base_weights.in_words(trained_on)}")
    if trained_with := base_weights.in_metadata(file.metadata, base_weights.KEY_APART):
        lines.append(f"{'trained':<14}with {base_weights.in_words(trained_with)}, for use without it")
    if (kept := protections.from_metadata(file.metadata)) is not None:
        lines.append(f"{'protection':<14}{summary.protections(kept)}")
    if finished := file.metadata.get("ss_training_finished_at"):
        lines += [f"{'finished':<14}{text}" for text in _time(finished)]
    if not file.metadata:
        lines.append("no metadata")
    return [*lines, "", *_norms(file)]


def _time(text: str) -> Iterator[str]:
    try:
        yield datetime.fromtimestamp(int(float(text))).isoformat(sep=" ")
    except (ValueError, OverflowError, OSError):
        yield text


def _norms(file: AdapterFile) -> Iterator[str]:
    """A line for each block: layers, and the Frobenius norm of their differences where these do not need the base."""
    from networks.tools.low_rank import factors_of

    squares: dict[str, list[float]] = {}
    others: dict[str, int] = {}
    for name, layer in file.layers.items():
        block = block_of(name)
        if layer.kind in ("lora", "tucker"):
            squares.setdefault(block, []).append(factors_of(layer.tensors).norm() ** 2)
        else:
            others[block] = others.get(block, 0) + 1
    names = sorted({*squares, *others}, key=order)
    width = max((len(name) for name in names), default=0)
    yield f"{'block':<{width}}  {'layers':>6}  norm of the difference"
    for name in names:
        own = squares.get(name, [])
        norm = f"{sum(own) ** 0.5:.4g}" if own else "-"
        yield f"{name:<{width}}  {len(own) + others.get(name, 0):>6}  {norm}"
    if others:
        yield f"{sum(others.values())} layers are of a kind whose norm is not computed here"


def settings_toml(metadata: Mapping[str, str]) -> str:
    """The settings that the metadata state, as a config file of the trainer."""
    found = settings(metadata)
    base = metadata.get("ss_sd_model_name", "")
    lines = [
        "# To be completed, the metadata of a file have no paths:",
        f'# pretrained_model_name_or_path = "{json.dumps(base)[1:-1]}"',
        '# train_data_dir = ""',
        '# output_dir = ""',
        "",
        toml_text(found),
    ]
    return "\n".join(lines)


def settings(metadata: Mapping[str, str]) -> dict[str, object]:
    """Options of the trainer by name, with the values that a file's metadata state. Defaults are left out."""
    from library.config.options import declared_options

    found: dict[str, object] = {}
    for name, item in declared_options().items():
        key = f"ss_{name}"
        if key in metadata and key not in _NOT_SETTINGS and (value := _value(item, metadata[key])) is not None:
            found[name] = value
    found |= _network(metadata) | _optimizer(metadata) | _data(metadata)
    if (steps := metadata.get("ss_max_train_steps", "")).isdecimal():
        found["max_train_steps"] = int(steps)
    if (name := metadata.get("ss_output_name", "None")) != "None":
        found["output_name"] = name
    return dict(sorted(found.items()))


def _value(item: Declared, text: str) -> object:
    """The value of an option that a metadata text stands for; None for the default, or where it is none."""
    if text in ("None", ""):
        return None
    words = tuple(re.findall(r"[^\s,\[\]()']+", text)) if item.many else (text,)
    try:
        value = convert(item, words)
    except BadValue:
        return None
    if value == item.default:
        return None
    if isinstance(value, tuple):
        return list(value) if item.many else text
    return value if isinstance(value, bool | int | float | str) else text


def _network(metadata: Mapping[str, str]) -> dict[str, object]:
    from networks.tools.result import network_arguments

    found: dict[str, object] = {}
    for name, kind in (("network_dim", int), ("network_alpha", float)):
        try:
            found[name] = kind(metadata.get(f"ss_{name}", ""))
        except ValueError:
            continue  # "None", or "Dynamic" of a resized file
    if arguments := network_arguments(metadata):
        found["network_args"] = arguments
    return found


def _optimizer(metadata: Mapping[str, str]) -> dict[str, object]:
    """`torch.optim.adamw.AdamW(weight_decay=0.1)` as type and arguments."""
    match = _OPTIMIZER.fullmatch(metadata.get("ss_optimizer", ""))
    if match is None:
        return {}
    path = match["type"]
    found: dict[str, object] = {"optimizer_type": path.rpartition(".")[2] if "custom_adamw" in path else path}
    if match["arguments"]:
        # commas inside of brackets separate no arguments
        found["optimizer_args"] = [word.strip() for word in re.split(r",(?![^(\[]*[)\]])", match["arguments"])]
    return found


def _data(metadata: Mapping[str, str]) -> dict[str, object]:
    """Batch and resolution, of the first dataset where there are several."""
    found: dict[str, object] = {}
    batch, resolution = metadata.get("ss_batch_size_per_device", ""), metadata.get("ss_resolution", "")
    try:
        datasets = json.loads(metadata.get("ss_datasets", "[]"))
    except (ValueError, RecursionError):
        datasets = []
    if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict):
        batch, resolution = str(datasets[0].get("batch_size_per_device", "")), str(datasets[0].get("resolution", ""))
    if batch.isdecimal():
        found["train_batch_size"] = int(batch)
    if len(sizes := re.findall(r"\d+", resolution)) == 2:
        found["resolution"] = ",".join(sizes)
    return found
