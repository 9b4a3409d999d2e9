"""Watches a run: what each step did goes to the trackers and to `NAME-metrics.jsonl`, and signs of trouble are said."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.memory import peak_memory
from library.optimizers.create import effective_weight_decays
from library.record import metrics
from library.record.run_file import RunFile
from library.training.meter import Measured, Meter
from library.training.warning_signs import WEIGHT_DECAY_GONE, Sign, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from library.training.loop import Run

logger = logging.getLogger(__name__)


class Monitor:
    """Called by the loop around each step of the optimizer, and with what was known of it afterwards.

    Every process has one, because measuring is done together; `file` is the main process's only.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        run: Run,
        every: int,
        bins: list[str],
        file: metrics.MetricsFile | None,
        record: RunFile | None = None,
    ) -> None:
        """Measure at every `every`-th step, the first and the last. `bins`: names of the ranges of timesteps."""
        self._meter, self._file, self._bins, self._every = meter, file, bins, every
        self._run, self._record = run, RunFile() if record is None else record
        self._watch = Watch(total_steps=run.total_steps)
        self._step = run.done
        self._measured: Measured | None = None
        self._norm: float | None = None
        self._earlier = 0.0  # seconds of training before this process
        self._began = time.monotonic()
        if file is not None and run.done:
            self._earlier = self._recall(file)

    def batch(self, per_sample_B: Tensor, t_B: Tensor) -> None:
        """The losses of a batch, detached, with their timesteps, which lie on the CPU."""
        self._meter.batch(per_sample_B, t_B)

    def before_step(self, step: int, *, gradient_norm: float) -> None:
        """`gradient_norm`: of all gradients together, before clipping."""
        self._norm = gradient_norm
        self._meter.take_in()
        if self._is_due(step):
            self._meter.before()

    def after_step(self, step: int) -> None:
        """The weights are new, unless the step was left out because fp16 losses were scaled too far."""
        if self._is_due(step) and not self._run.optimizer.step_was_skipped:
            self._measured = self._meter.after()

    def report(
        self, step: int, *, epoch: int, loss: float, average: float, rates: Mapping[str, float]
    ) -> dict[str, Any]:
        """Write the step's line, say what is wrong; what trackers show beside loss and rates."""
        self._step = step
        self._record.step(step)
        decays = effective_weight_decays(self._run.optimizer.optimizer)
        if len(set(decays.values())) == 1:  # one for all groups, as a rule
            decays = {"all": next(iter(decays.values()))}
        measured, norm = self._measured, self._norm  # None: the step was skipped
        self._measured = self._norm = None
        line: dict[str, Any] = {
            "epoch": epoch,
            "seconds": self._earlier + time.monotonic() - self._began,
            "loss": loss,
            "loss_average": average,
            "gradient_norm": norm,
            "rates": dict(rates),
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
        self._write(step, line)
        self._say(step, self._look(step, line))
        return self._for_trackers(norm, decays, measured)

    def validation(self, step: int, losses: Mapping[str, float], *, loss: float) -> None:
        """Losses on images that are not trained, by whatever names; `loss` is the one to judge by."""
        self._write(step, {"validation": {"loss": loss, **losses}})
        self._say(step, self._watch.validated(step, loss, self._run.losses.curve()))

    def go_back(self, step: int, *, why: str) -> None:
        """The run stands where it stood after `step` steps, and goes on from there."""
        self._measured = self._norm = None
        self._record.step(step)
        self._watch = Watch(total_steps=self._run.total_steps)
        if self._file is not None:
            self._file.go_back(step)
            self._recall(self._file)
        self.diverged(step, why)

    def diverged(self, step: int, why: str) -> None:
        """Note a loss or gradient that was no number, of which the guard has said something already."""
        self._meter.forget()
        self._write(step, {"warning": {"sign": "divergence", "text": why}})

    def end(self, *, stopped_by: str, conclusion: str) -> None:
        """Write the last line: what broke it off ("" for nothing), what validation says of it, and the most memory."""
        memory = peak_memory(self._run.accelerator.device)
        self._write(self._step, {"end": {"stopped_by": stopped_by, "conclusion": conclusion, "memory": memory}})
        if self._file is not None:
            self._file.close()

    def _is_due(self, step: int) -> bool:
        return step % self._every == 0 or step in (1, self._run.total_steps)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(step, values)

    def _look(self, step: int, line: Mapping[str, Any]) -> list[Sign]:
        """What the rules find in a step's line."""
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
                moved=line.get("moved", {}),  # files of earlier versions have none
                loss_by_timestep=line["loss_by_timestep"],
            )
        return signs

    def _say(self, step: int, signs: list[Sign]) -> None:
        for sign in signs:
            self._write(step, {"warning": {"sign": sign.name, "text": sign.text}})
            if sign is not WEIGHT_DECAY_GONE and self._run.accelerator.is_main_process:  # the optimizer has said it
                logger.warning("step %d: %s", step, sign.text)

    def _recall(self, file: metrics.MetricsFile) -> float:
        """What the lines of the earlier part of this run tell, as if they had just been reported; its seconds."""
        said, seconds = set(), 0.0
        for line in file.kept():
            if "loss" in line:
                self._look(line["step"], line)
                seconds = line["seconds"]
            elif "validation" in line:
                self._watch.validated(line["step"], _number(line["validation"]["loss"]), self._run.losses.curve())
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
    """As it was before the file, which has null for what is not finite."""
    return float("nan") if value is None else value
