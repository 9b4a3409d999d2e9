"""Reads the files of a run: its record, its metrics, its networks and its samples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError, nearest_path
from library.files.hashes import sha256
from library.files.header import read_metadata
from library.record import run_file, summary
from library.record.facts import Facts
from library.record.metrics import SUFFIX, Line, lines
from library.record.run_file import Record
from library.sampling import files as sample_files
from library.sampling.files import Sample
from networks.base_weights import KEY, KEY_APART, in_metadata, in_words

MOST_POINTS = 1500  # of a curve


class Curve:
    """(step, value) of a run of any length, in constant memory: beyond `MOST_POINTS` neighbours become their mean."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.values: list[float] = []
        self._stride = 1
        self._begun: list[tuple[float, float]] = []

    def add(self, step: float, value: float | None) -> None:
        """Add the next value; None is ignored."""
        if value is None:
            return
        self._begun.append((step, value))
        if len(self._begun) < self._stride:
            return
        self.steps.append(sum(step for step, _ in self._begun) / self._stride)
        self.values.append(sum(value for _, value in self._begun) / self._stride)
        self._begun = []
        if len(self.steps) >= MOST_POINTS:
            self.steps, self.values = _halved(self.steps), _halved(self.values)
            self._stride *= 2


@dataclass
class Story:
    """The facts about a run. `curves` by name: "loss", "rates/unet" … `record`: None for runs of versions that wrote
    none, and if the file no longer exists."""

    path: Path  # of the metrics
    run: Line  # the first line of the metrics
    record: Record | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    warnings: list[tuple[int, str, str]] = field(default_factory=list)  # step, sign, text
    last_step: int = 0
    seconds: float = 0.0
    end: Line = field(default_factory=dict)  # empty: the run was killed, or is still running
    forgetting: tuple[int, Line] | None = None  # the last step it was measured after, and the numbers of each folder
    largest: list[tuple[str, float]] = field(default_factory=list)  # adapters with the largest deltas at the end

    @property
    def name(self) -> str:
        return str(self.run.get("name", self.path.name.removesuffix(SUFFIX)))

    @property
    def best(self) -> tuple[float, float] | None:
        """The step with the lowest validation loss after a step, and that loss."""
        curve = self.curves.get("validation/loss", Curve())
        after = [(step, loss) for step, loss in zip(curve.steps, curve.values, strict=True) if step > 0]
        return min(after, key=lambda point: point[1], default=None)

    @property
    def facts(self) -> Facts | None:
        return None if self.record is None else self.record.facts

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Label and text of each line of the console's summary."""
        if self.facts is not None:
            return list(summary.rows(self.facts))
        return [(str(label), str(text)) for label, text in self.run.get("summary", ())]


@dataclass(frozen=True)
class SavedFile:
    """A LoRA or another file of a run."""

    path: Path
    size: int
    sha256: str
    model_hash: str  # as A1111 shows it; empty for pickled files
    step: str
    base_weights: str  # the LoRA files that it was trained on top of, as their names × multipliers
    training_adapters: str  # those that acted in training alone


def find_metrics(where: Path) -> list[Path]:
    """The metrics files at `where`: one, or all in a folder. Raises UserError if there are none."""
    if where.is_dir():
        found = sorted(where.glob(f"*{SUFFIX}"))
        if not found:
            raise UserError(f"{where}: there is no …{SUFFIX} in it; training writes one unless --no-monitoring")
        return found
    if not where.is_file():
        raise UserError(f"{where}: no such file or folder{nearest_path(where)}")
    if not where.name.endswith(SUFFIX):
        raise UserError(f"{where}: give a run's folder, or its file NAME{SUFFIX}")
    return [where]


def read_story(path: Path) -> Story:
    """Read the files of the run with these metrics. Raises UserError if `path` is no metrics file."""
    every = lines(path)
    run = next(every, {}).get("run")
    if not isinstance(run, dict):
        raise UserError(f"{path}: its first line does not describe a run")
    story = Story(path, run, _record_of(path, run))
    deltas: list[float] = []
    for line in every:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        story.last_step = max(story.last_step, step)
        if "loss" in line:
            story.end = {}  # that of an earlier part of the run
            _step(story, step, line)
            deltas = line.get("delta_norms") or deltas
        elif "validation" in line:
            for name, value in line["validation"].items():
                _add(story, f"validation/{name}", step, value)
        elif "validation_sets" in line:
            for name, own in line["validation_sets"].items():
                _add(story, f"validation_sets/{name}", step, own["loss"])
        elif "gap" in line:
            _add(story, "gap/gap", step, _percent(line["gap"]["gap"]))
            _add(story, "gap/trained", step, line["gap"]["trained"])
        elif "forgetting" in line:
            story.forgetting = (step, line["forgetting"])
            for name, own in line["forgetting"].items():
                _add(story, f"forgetting/{name}", step, _percent(own["rate"]))
        elif "warning" in line:
            story.warnings.append((step, line["warning"]["sign"], line["warning"]["text"]))
        elif "end" in line:
            story.end = line["end"]
    named = zip(run.get("adapters", ()), deltas, strict=False)
    story.largest = sorted(named, key=lambda item: -(item[1] or 0))[:8]
    return story


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _record_of(metrics: Path, run: Line) -> Record | None:
    """The record beside the metrics, if it belongs to the same run."""
    record = run_file.read(metrics.with_name(metrics.name.removesuffix(SUFFIX) + run_file.SUFFIX))
    return record if record is not None and record.id == run.get("session_id") else None


def _step(story: Story, step: int, line: Line) -> None:
    story.seconds = line.get("seconds") or story.seconds
    for name in ("loss", "loss_average", "gradient_norm", "update_ratio", "weight_norm"):
        _add(story, name, step, line.get(name))
    for name in ("rates", "weight_decay"):
        for group, value in line.get(name, {}).items():
            _add(story, f"{name}/{group}", step, value)
    for label, value in zip(story.run.get("timesteps", ()), line.get("loss_by_timestep", ()), strict=False):
        _add(story, f"timesteps/{label}", step, value)
    norms = [norm for norm in line.get("delta_norms", ()) if norm is not None]
    if not norms:
        return
    _add(story, "deltas/mean", step, sum(norms) / len(norms))
    _add(story, "deltas/largest", step, max(norms))
    blocks: dict[str, list[float]] = {}
    for adapter, norm in zip(story.run.get("adapters", ()), line["delta_norms"], strict=False):
        if norm is not None:
            blocks.setdefault(block_of(adapter), []).append(norm)
    for block, own in blocks.items():
        _add(story, f"deltas/{block}", step, math.fsum(own) / len(own))


def _add(story: Story, name: str, step: int, value: float | None) -> None:
    story.curves.setdefault(name, Curve()).add(step, value)


def block_of(adapter: str) -> str:
    """lora_unet_down_blocks_0_attentions_1_… → "down 0"; every text encoder is one."""
    if found := re.match(r"lora_unet_(down|up|input|output|double|single|joint)_blocks_(\d+)_", adapter):
        return f"{found[1]} {found[2]}"
    if found := re.match(r"lora_unet_(?:blocks|layers)_(\d+)_", adapter):  # Anima's and Z-Image's
        return f"block {found[1]}"
    if adapter.startswith(("lora_unet_mid_block", "lora_unet_middle_block")):
        return "middle"
    found = re.match(r"lora_te(\d?)_", adapter)
    return f"text encoder {found[1]}".strip() if found else "other"


def _halved(values: list[float]) -> list[float]:
    return [(first + second) / 2 for first, second in zip(values[::2], values[1::2], strict=False)]


def saved_files(story: Story) -> list[SavedFile]:
    """The networks that the run has written and that still exist, the oldest first."""
    name = "(last|at|epoch)" if story.run.get("output_name") is None else re.escape(story.name)
    pickled = re.compile(rf"{name}(-step\d{{8,}}|-\d{{6,}}|-[a-z]+)?\.(ckpt|pt)")
    found = []
    for path in filter(Path.is_file, story.path.parent.iterdir()):
        about = read_metadata(path) if path.suffix == ".safetensors" else {}
        session = about.get("ss_session_id", "")
        if session == str(story.run.get("session_id")) or (pickled.fullmatch(path.name) and _since(path, story)):
            hashes = (sha256(path), about.get("sshs_model_hash", ""), about.get("ss_steps", ""))
            base = [in_words(in_metadata(about, key)) for key in (KEY, KEY_APART)]
            found.append((path.stat().st_mtime, SavedFile(path, path.stat().st_size, *hashes, *base)))
    return [file for _, file in sorted(found, key=lambda item: item[0])]


def _since(path: Path, story: Story) -> bool:
    """Whether a file without the id of a run was written since this run began."""
    return path.stat().st_mtime >= int(story.run.get("started_at", 0))


def samples(story: Story) -> list[Sample]:
    """The run's samples in `sample/`."""
    since = float(story.run.get("started_at", 0))
    return sample_files.find(story.path.parent / "sample", story.run.get("output_name"), since=since)
