"""Monitors a run: logs the numbers of each step to the trackers and `NAME-metrics.jsonl`, and warns of trouble."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.memory import peak_memory
from library.optimizers.create import effective_weight_decays, tensor_bytes
from library.record import metrics
from library.record.run_file import RunFile
from library.record.validation_history import Validation
from library.training.hook import Hook, StateDict, Step
from library.training.meter import Measured, Meter
from library.training.run import Run
from library.training.warning_signs import WEIGHT_DECAY_GONE, Sign, Watch

if TYPE_CHECKING:
    from library.data.dataset import Batch
    from library.training.step import BatchLoss

logger = logging.getLogger(__name__)


class Monitor(Hook[Run]):
    """Every process has one, because all take part in measuring; the main process's writes the file, if it is open."""

    name = "monitor"

    def __init__(self, meter: Meter, *, every: int, bins: list[str], record: RunFile) -> None:
        """Measure at every `every`-th step, the first and the last. `bins`: names of the ranges of noise levels.
        `record`: gets the number of steps done."""
        self._meter, self._every, self._bins, self._record = meter, every, bins, record
        self._file: metrics.MetricsFile | None = None
        self._watch = Watch(total_steps=0)
        self._step = 0
        self._measured: Measured | None = None
        self._earlier = 0.0  # seconds of training before this process
        self._began = time.monotonic()

    def open(self, file: metrics.MetricsFile) -> None:
        """Write the reports into this file, from the first step on."""
        self._file = file

    def before_training(self, run: Run) -> None:
        self._watch = Watch(total_steps=run.position.total)
        self._step = run.position.done
        self._began = time.monotonic()
        if self._file is not None and run.position.done:
            self._earlier = self._recall(run, self._file)

    def after_batch(self, run: Run, batch: Batch, found: BatchLoss) -> None:
        self._meter.batch(found.per_sample.detach(), found.t)

    def before_step(self, run: Run, step: Step) -> None:
        self._meter.take_in()
        if self._is_due(run, step):
            self._meter.before()

    def after_step(self, run: Run, step: Step) -> None:
        if self._is_due(run, step) and not step.was_skipped:
            self._measured = self._meter.after()

    def report(self, run: Run, step: Step) -> dict[str, float]:
        """Write the step's line, and warn of signs of trouble."""
        self._step = step.number
        self._record.step(step.number)
        decays = effective_weight_decays(run.optimizer.optimizer)
        if len(set(decays.values())) == 1:  # one for all groups, as a rule
            decays = {"all": next(iter(decays.values()))}
        measured, self._measured = self._measured, None
        line: dict[str, Any] = {
            "epoch": step.epoch + 1,
            "seconds": self._earlier + time.monotonic() - self._began,
            "loss": step.loss,
            "loss_average": run.losses.average,
            "gradient_norm": step.gradient_norm,
            "rates": dict(step.rates),
            "weight_decay": decays,
        }
        if measured is not None:
            line |= {
                "update_ratio": measured.update_ratio,
                "weight_norm": measured.weight_norm,
                "moved": {name: metrics.rounded(share) for name, share in measured.moved.items()},
                "loss_by_timestep": measured.loss_by_timestep,
                "delta_norms": [metrics.rounded(norm) for norm in measured.delta_norms],
            }
        self._write(step.number, line)
        self._warn(run, step.number, self._look(step.number, line))
        return self._for_trackers(step.gradient_norm, decays, measured)

    def validated(self, run: Run, result: Validation, *, best: bool) -> None:
        parts = {f"t{t}": loss for t, loss in result.by_timestep.items()}
        self._write(result.step, {"validation": {"loss": result.loss, **parts}})
        self._warn(run, result.step, self._watch.validated(result.step, result.loss, run.losses.curve()))

    def noted(self, run: Run, step: int, values: Mapping[str, Any]) -> None:
        self._write(step, values)

    def diverged(self, run: Run, step: int, why: str) -> None:
        self._meter.forget()
        self._write(step, {"warning": {"sign": "divergence", "text": why}})

    def rolled_back(self, run: Run, step: int, why: str) -> None:
        self._measured = None
        self._record.step(step)
        self._watch = Watch(total_steps=run.position.total)
        if self._file is not None:
            self._file.go_back(step)
            self._recall(run, self._file)
        self.diverged(run, step, why)

    def end(self, run: Run, *, stopped_by: str, conclusion: str) -> None:
        """Write the last line, with the peak memory."""
        memory = peak_memory(run.accelerator.device)
        memory["of the optimizer's state"] = tensor_bytes(run.optimizer.optimizer.state)
        self._write(self._step, {"end": {"stopped_by": stopped_by, "conclusion": conclusion, "memory": memory}})
        if self._file is not None:
            self._file.close()

    def state_dict(self) -> StateDict:
        return self._meter.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self._meter.load_state_dict(state)

    def _is_due(self, run: Run, step: Step) -> bool:
        return step.number % self._every == 0 or step.number in (1, run.position.total)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(step, values)

    def _look(self, step: int, line: Mapping[str, Any]) -> list[Sign]:
        """The warning signs that the rules find in a step's line."""
        self._watch.trained(step, epoch=line["epoch"], loss=_number(line["loss"]))
        signs = self._watch.step(
            loss=_number(line["loss"]),
            gradient_norm=line["gradient_norm"],
            weight_decay=max(line["weight_decay"].values(), default=None),
        )
        if "update_ratio" in line:
            signs += self._watch.measured(
                step,
                update_ratio=_number(line["update_ratio"]),
                rates=line["rates"],
                moved=line.get("moved", {}),  # missing in files of earlier versions
                loss_by_timestep=line["loss_by_timestep"],
            )
        return signs

    def _warn(self, run: Run, step: int, signs: list[Sign]) -> None:
        for sign in signs:
            self._write(step, {"warning": {"sign": sign.name, "text": sign.text}})
            if sign is not WEIGHT_DECAY_GONE and run.accelerator.is_main_process:  # the optimizer logs that one itself
                logger.warning("step %d: %s", step, sign.text)

    def _recall(self, run: Run, file: metrics.MetricsFile) -> float:
        """Replay the lines of the earlier part of this run through the rules; returns that part's seconds."""
        said, seconds = set(), 0.0
        for line in file.kept():
            if "loss" in line:
                self._look(line["step"], line)
                seconds = line["seconds"]
            elif "validation" in line:
                self._watch.validated(line["step"], _number(line["validation"]["loss"]), run.losses.curve())
            elif "warning" in line:
                said.add(line["warning"]["sign"])
        self._watch.found = said
        return seconds

    def _for_trackers(
        self, norm: float | None, decays: Mapping[str, float], measured: Measured | None
    ) -> dict[str, float]:
        values = {f"weight_decay/{name}": decay for name, decay in decays.items()}
        if norm is not None:
            values["norm/gradient"] = norm
        if measured is None:
            return values
        values |= {"norm/update_ratio": measured.update_ratio, "norm/weights": measured.weight_norm}
        values |= {f"moved/{name}": share for name, share in measured.moved.items()}
        for name, loss in zip(self._bins, measured.loss_by_timestep, strict=True):
            if loss is not None:
                values[f"loss/timestep_{name}"] = loss
        if norms := measured.delta_norms:  # the first under kohya's name
            values |= {"norm/avg_key_norm": sum(norms) / len(norms), "norm/max_key_norm": max(norms)}
        return values


def _number(value: float | None) -> float:
    """The number of a value in the file, which has null for numbers that are not finite."""
    return float("nan") if value is None else value
