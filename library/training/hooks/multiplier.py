"""Keeps a slider's network at the multiplier of its batch until the gradients are there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from library.data.sources.prompts import PromptBatch
from library.training.hook import Hook, Step
from library.training.run import Run

if TYPE_CHECKING:
    from library.data.dataset import Batch


class Multiplier(Hook[Run]):
    """With gradient checkpointing the backward pass computes layers again: they must have the multiplier of the
    forward pass then. Between the steps it is 1: pictures and norms are those of the LoRA as it is used."""

    name = "multiplier"

    def __init__(self) -> None:
        self._held: AbstractContextManager[None] | None = None

    def before_batch(self, run: Run, batch: Batch) -> None:
        assert isinstance(batch, PromptBatch)
        self._release()
        self._held = run.network.at(batch.setting.multiplier)
        self._held.__enter__()

    def after_backward(self, run: Run, step: Step) -> None:
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.__exit__(None, None, None)
            self._held = None
