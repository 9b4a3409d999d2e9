"""What is compared of a finished case, as JSON has it.

Everything that depends on the last bit of the arithmetic stands under the key "bits", losses under "losses"; the rest
(names, shapes, metadata, text) is the same on every machine.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.yardstick.plain_text import Places

Json = dict[str, Any]

# Of ids, clocks and the machine, and what is hashed over them.
MASKED = frozenset(
    (
        *("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_legacy_hash"),
        *("session_id", "started_at", "machine", "seconds", "memory", "sha256"),
        *("id", "pid", "host", "started", "heartbeat", "ended", "bytes"),  # a file's size has the digits of its times
    )
)
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}
DRAWN = ("-loss.png", "-find-lr.png")  # curves, whose pixels are matplotlib's
PER_LINE, DIGITS = 20, 4
FEW = 12  # keys in which the metadata of files of one run differ


class Layouts:
    """Tables of names, types and shapes by their hash: many files share one."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, lines: Iterable[str]) -> str:
        text = "\n".join(lines) + "\n"
        name = short(text.encode(), 10)
        self.texts[name] = text
        return name


def short(content: bytes, digits: int = 12) -> str:
    return hashlib.sha256(content).hexdigest()[:digits]


def case_files(folder: Path) -> list[str]:
    """All files of a case, as they are now."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def observe(folder: Path, *, before: Iterable[str], places: Places, layouts: Layouts) -> Json:
    """What a case has left in its folder, by file; `before`: what was there already."""
    found: Json = {}
    for name in sorted(set(case_files(folder)) - set(before)):
        known = places.named(name)
        while known in found:  # but for the time they have the same name
            known += " (another)"
        found[known] = _file(folder / name, places, layouts)
    _refer(found)
    return found


def _refer(files: Json) -> None:
    """Write metadata that is almost that of an earlier file as the difference from it."""
    whole: dict[str, Json] = {}
    for name, file in files.items():
        if "metadata" not in file:
            continue
        own = file["metadata"]
        for other, theirs in whole.items():
            changed = {key: own.get(key) for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key)}
            if len(changed) <= FEW:
                file["metadata"] = {"as in": other, "but": dict(sorted(changed.items()))}
                break
        else:
            whole[name] = own


def _file(path: Path, places: Places, layouts: Layouts) -> Json:
    for ending, read in _READERS.items():
        if path.name.endswith(ending):
            return read(path, places, layouts)
    return {}


# -- tensors


def _safetensors(path: Path, places: Places, layouts: Layouts) -> Json:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    data = content[8 + length :]
    tensors = {
        key: (NAMES.get(entry["dtype"], entry["dtype"]), entry["shape"], data[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }
    return _table(tensors, layouts) | ({} if metadata is None else {"metadata": _metadata(metadata, places)})


def _pickled(path: Path, places: Places, layouts: Layouts) -> Json:
    import torch

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return _table({key: _parts(tensor) for key, tensor in tensors.items()}, layouts)


def _parts(tensor: Any) -> tuple[str, list[int], bytes]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _table(tensors: Mapping[str, tuple[str, list[int], bytes]], layouts: Layouts) -> Json:
    """Names, types and shapes in the file's order; one hash of all contents, and a short one of each."""
    layout = layouts.add(_by_layer({key: f"{kind} {list(shape)}" for key, (kind, shape, _) in tensors.items()}))
    contents = [content for _, _, content in tensors.values()]
    each = [short(content, DIGITS) for content in contents]
    lines = [" ".join(each[at : at + PER_LINE]) for at in range(0, len(each), PER_LINE)]
    return {"layout": layout, "bits": {"all": short(b"".join(contents), 32), "each": lines}}


def _by_layer(tensors: Mapping[str, str]) -> Iterator[str]:
    """A line for each layer, which is a key up to its first dot, as long as a file has its tensors together."""
    for layer, keys in groupby(tensors, key=lambda key: key.partition(".")[0]):
        yield " | ".join([layer, *(f"{key.partition('.')[2]} {tensors[key]}" for key in keys)])


def keys_of(layout: str) -> list[str]:
    """The keys of a table, from the text of its layout."""
    keys = []
    for line in layout.splitlines():
        layer, *parts = line.split(" | ")
        keys += [".".join(filter(None, (layer, part.split(" ")[0]))) for part in parts]
    return keys


def _metadata(metadata: Mapping[str, str], places: Places) -> Json:
    """Each value, as what it stands for if it is JSON."""

    def plain(text: str) -> Any:
        if text[:1] in "{[":
            try:
                return _masked(json.loads(text), places)
            except ValueError:
                pass
        return places.named(text)

    return {key: "<masked>" if key in MASKED else plain(metadata[key]) for key in sorted(metadata)}


# -- states


def _state(path: Path, places: Places, layouts: Layouts) -> Json:
    import torch

    tree = torch.load(path, map_location="cpu", weights_only=True)
    leaves = list(_leaves(tree))
    kinds = Counter(f"{re.sub('[0-9]+', '*', name)} {_kind(leaf)}" for name, leaf in leaves)
    layout = layouts.add(f"{kind}, {count} times" for kind, count in kinds.items())
    groups: dict[str, Any] = {}
    for name, leaf in leaves:
        group = "/".join(name.split("/")[:2]) if name.startswith(("optimizer", "schedule")) else name.split("/")[0]
        groups.setdefault(group, hashlib.sha256()).update(_content(name, leaf))
    return {"layout": layout, "bits": {name: digest.hexdigest()[:12] for name, digest in groups.items()}}


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple) and not all(isinstance(item, int | float) for item in tree):
        items = enumerate(tree)
    else:
        yield name, tree
        return
    for key, item in items:
        yield from _leaves(item, f"{name}/{key}" if name else str(key))


def _kind(leaf: Any) -> str:
    if hasattr(leaf, "shape"):
        return f"{_parts(leaf)[0]} of {leaf.ndim} dimensions"
    return type(leaf).__name__


def _content(name: str, leaf: Any) -> bytes:
    if not hasattr(leaf, "shape"):
        return f"{name} {leaf!r}".encode()
    kind, shape, content = _parts(leaf)
    return f"{name} {kind} {shape}".encode() + content


# -- metrics, tables, pictures, text


def _metrics(path: Path, places: Places, layouts: Layouts) -> Json:
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, list[Any]] = {}
    losses: dict[str, list[Any]] = {}
    said = []
    for line in lines:
        step = line.pop("step")
        for name in ("warning", "end"):
            if name in line:
                said.append({"step": step, name: _masked(line.pop(name), places)})
        for name, value in line.items():
            if name not in MASKED:
                columns.setdefault(name, []).append([step, value])
        if "loss" in line:
            losses.setdefault("loss", []).append(line["loss"])
        if "validation" in line:
            losses.setdefault("validation", []).append(line["validation"]["loss"])
    run = first["run"]
    run["options"] = {name: value for _, name, value, default in run["options"] if value != default}
    run["adapters"] = layouts.add(run["adapters"])
    bits = {name: f"{len(column)} lines, {short(repr(column).encode())}" for name, column in columns.items()}
    return {"run": _masked(run, places), "losses": losses, "said": said, "bits": bits}


def _record(path: Path, places: Places, layouts: Layouts) -> Json:
    """How the run stands and its typed facts; of the options those that are given, for the metrics have all."""
    table = json.loads(path.read_text(encoding="utf-8"))
    settings, sessions = table.pop("settings"), table.pop("sessions")
    table["command"] = " ".join(table["command"])
    table["given"] = " ".join(settings["given"])
    told = ("status", "reason", "first_step", "steps_done")
    table["sessions"] = [{name: session[name] for name in told} for session in sessions]
    return {"record": _masked({name: item for name, item in table.items() if name not in MASKED}, places)}


def _facts(path: Path, places: Places, layouts: Layouts) -> Json:
    """A JSON file; of settings what is set: one that is new and off changes nothing."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name, value in facts.items():
        if isinstance(value, dict):
            facts[name] = {key: item for key, item in value.items() if item}
    return {"facts": _masked(facts, places)}


def _masked(value: Any, places: Places) -> Any:
    if isinstance(value, dict):
        return {key: "<masked>" if key in MASKED else _masked(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, places) for item in value]
    return places.named(value) if isinstance(value, str) else value


def _picture(path: Path, places: Places, layouts: Layouts) -> Json:
    from PIL import Image

    if path.name.endswith(DRAWN):
        return {}
    with Image.open(path) as picture:
        return {"size": list(picture.size), "mode": picture.mode, "bits": {"pixels": short(picture.tobytes())}}


def _numbers(path: Path, places: Places, layouts: Layouts) -> Json:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    return {"head": head, "losses": {name: [_number(row[at]) for row in rows] for at, name in enumerate(head)}}


def _number(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[-+\d.e]+", text) else text


def _text(path: Path, places: Places, layouts: Layouts) -> Json:
    return {"text": places.lines(path.read_text(encoding="utf-8"))}


def _events(path: Path, places: Places, layouts: Layouts) -> Json:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    scalars = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}
    return {"bits": {tag: f"{len(ones)} values, {short(repr(ones).encode())}" for tag, ones in scalars.items()}}


_READERS: dict[str, Callable[[Path, Places, Layouts], Json]] = {
    ".safetensors": _safetensors,
    "state.pt": _state,
    ".pt": _pickled,
    ".ckpt": _pickled,
    "-metrics.jsonl": _metrics,
    "-run.json": _record,
    "state.json": _facts,
    ".png": _picture,
    ".csv": _numbers,
    ".toml": _text,
    ".txt": _text,
}
