"""The pictures of a finished run, beside its last file: the loss curve, and prompts without and with the LoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library import rng
from library.errors import UserError
from library.out_of_memory import OutOfMemory, during
from library.report import loss_plot
from library.sampling import render
from library.training.hook import Hook
from library.training.hooks.validation import Validator
from library.training.run import Run

logger = logging.getLogger(__name__)


class Pictures(Hook[Run]):
    """On the main process. A run that is stopped renders none. If one cannot be rendered, that is logged."""

    name = "pictures"

    def __init__(
        self,
        paths: Mapping[str, Path],
        *,
        encode: Callable[[str, str], dict[str, Tensor]],
        vae_dtype: torch.dtype,
        prompts: Sequence[str],
        moved: Sequence[str] = (),
        size: tuple[int, int],
        steps: int,
        what: str = "the LoRA",
    ) -> None:
        """`paths`: of the wanted pictures, "loss", "compare" and "slider". `size`: width and height of the images of
        the `prompts`, and of those that a slider has `moved`, rendered in `steps` steps; `what`: is left out in the
        first row; `encode`: see `render.EncodedPrompts`."""
        self._paths, self._encode, self._vae_dtype = paths, encode, vae_dtype
        self._prompts, self._moved, self._size, self._steps, self._what = prompts, moved, size, steps, what

    def end(self, run: Run, *, stopped_by: str, conclusion: str) -> None:
        if stopped_by:
            return
        try:
            with during("the pictures of the finished run"):
                self._draw(run)
        except (UserError, OutOfMemory) as error:  # not raised: the trained network is saved already
            logger.error("%s", error)

    def _draw(self, run: Run) -> None:
        if path := self._paths.get("loss"):
            steps_per_epoch, title = run.saves.steps_per_epoch, run.saves.last_file.stem
            validator = run.hook(Validator)
            history = None if validator is None else validator.history
            loss_plot.plot(path, run.losses, steps_per_epoch=steps_per_epoch, title=title, validation=history)
            logger.info("drew %s", path)
        drawn = {
            "compare": partial(render.compare, without=run.network.off, prompts=self._prompts, what=self._what),
            "slider": partial(render.strengths, at=run.network.at, prompts=self._moved),
        }
        for kind, draw in drawn.items():
            if path := self._paths.get(kind):
                if "vae" not in run.family.components:
                    run.family.components.load("vae", self._vae_dtype, run.accelerator.device)
                with run.weights_for("sample"), rng.without_dropout(run.network):
                    draw(path, run.family, self._encode, size=self._size, steps=self._steps, seed=run.seed)
                logger.info("drew %s", path)
