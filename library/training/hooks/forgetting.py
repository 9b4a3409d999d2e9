"""Measures forgetting at each validation: losses on folders of unrelated images, beside those of the base alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.data.dataset import TrainingData
from library.out_of_memory import during
from library.record import trackers
from library.record.forgetting import Forgetting, advice
from library.rng import key_of
from library.training.hook import Hook, StateDict, Step
from library.training.hooks.validation import measure
from library.training.run import Run

logger = logging.getLogger(__name__)


class ForgettingMeter(Hook[Run]):
    """The base's losses are measured once, before the first step of this process, and are kept in the state."""

    name = "forgetting"

    def __init__(
        self,
        folders: Mapping[str, TrainingData],
        due: Callable[[int], object],
        *,
        timesteps: Sequence[int],
        most_batches: int | None,
        starts_as_base: bool,
    ) -> None:
        """`folders` by name. `due`: whether to measure after so many steps. `starts_as_base`: the network changes
        nothing before its first step. The rest as for `Validator`."""
        self.folders, self._due, self._timesteps, self._most_batches = folders, due, timesteps, most_batches
        self._starts_as_base = starts_as_base
        self._base: dict[str, dict[int, float]] = {}
        self._said: dict[str, int] = {}  # the highest level that was warned of
        self.latest: dict[str, Forgetting] = {}

    def before_training(self, run: Run) -> None:
        lacking = [name for name in self.folders if name not in self._base]
        for name in lacking:
            with during("measuring the base model's loss for forgetting", done=run.position.done), run.network.off():
                self._base[name] = self._losses(run, name)
        if run.position.done == 0:
            self.end_of_step(run, Step(0, 0))

    def end_of_step(self, run: Run, step: Step) -> bool:
        if not self._due(step.number):
            return False
        with during(f"measuring forgetting after step {step.number}", done=step.number):
            found = {name: self._measured(run, name, step.number) for name in self.folders}
        self.latest = found
        moment = f"after {step.number} steps" if step.number else "before training"
        for name, one in found.items():
            logger.info("forgetting of %s %s: %s", name, moment, one.in_words())
        for hook in run.hooks:
            hook.noted(run, step.number, {"forgetting": {name: one.line() for name, one in found.items()}})
        values = {f"forgetting/{name}": one.rate for name, one in found.items()}
        values |= {f"forgetting/{name}_t{t}": one.at(t) for name, one in found.items() for t in one.losses}
        trackers.tell(run.accelerator, values, step=step.number)
        self._warn(run, found)
        return False

    def _measured(self, run: Run, name: str, step: int) -> Forgetting:
        base = self._base[name]
        is_base = step == 0 and self._starts_as_base
        return Forgetting(step, base if is_base else self._losses(run, name), base)

    def _warn(self, run: Run, found: Mapping[str, Forgetting]) -> None:
        for name, one in found.items():
            if one.level <= self._said.get(name, 0):
                continue
            self._said[name] = one.level
            sign = ("", "forgetting", "severe forgetting")[one.level]
            text = f"the loss on {name} is {100 * one.rate:.1f} % above the base model's: {advice(one.level)}"
            if run.accelerator.is_main_process:
                logger.warning("step %d: %s: %s", one.step, sign, text)
            for hook in run.hooks:
                hook.noted(run, one.step, {"warning": {"sign": sign, "text": text}})

    def _losses(self, run: Run, name: str) -> dict[int, float]:
        data = self.folders[name]
        return measure(run, data, data.plan(0)[: self._most_batches], self._timesteps)

    def state_dict(self) -> StateDict:
        base = {name: {"images": self._images(name), "losses": losses} for name, losses in self._base.items()}
        return {"base": base, "said": dict(self._said)}

    def load_state_dict(self, state: StateDict) -> None:
        """Folders with other images than then are measured anew."""
        kept = {name: one for name, one in state["base"].items() if one["images"] == self._images(name)}
        self._base = {name: dict(one["losses"]) for name, one in kept.items()}
        self._said = {name: level for name, level in state["said"].items() if name in kept}

    def _images(self, name: str) -> int:
        """A number that other images, captions, noise or noise levels change."""
        data: Any = self.folders.get(name)
        if data is None:
            return 0
        images = sorted((sample.key, sample.caption) for sample in data.samples)
        return key_of(data.seed, str(images), str(self._timesteps), str(self._most_batches)) >> 1
