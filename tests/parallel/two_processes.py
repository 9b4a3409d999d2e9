"""Runs the command line several times in each process of one `torchrun`, and notes what each of them did.

`torchrun … two_processes.py FOLDER` reads `FOLDER/runs.json`, {name: words}, and writes `FOLDER/NAME.RANK.json`. Words
that begin with "@" are not the command line's: "@stop=3" sends SIGINT to the second process in that step, "@nan=2"
makes the loss of its batch NaN, "@second=WORD" is a word for that process only, "@fsdp=1" and "@deepspeed=1" ask for
those as accelerate's launcher does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402

from library import processes  # noqa: E402
from library.training import loop  # noqa: E402
from train_network import main  # noqa: E402

RANK = int(os.environ["RANK"])
SHARING = ("fsdp", "deepspeed")


def observed(words: list[str]) -> dict[str, Any]:
    """Run it; the exit code, the error, each batch that was seen as (step, keys), and what this process wrote."""
    asked = dict(word[1:].split("=", 1) for word in words if word.startswith("@"))
    given = [word for word in words if not word.startswith("@")]
    if RANK == 1 and "second" in asked:
        given.append(asked["second"])
    seen: list[tuple[int, list[str]]] = []
    written: list[str] = []
    world: list[int] = []
    one_step, backward, replace = loop.optimizer_step, loop.backward, os.replace
    step = 0

    def watched_step(run: loop.Run, item: loop.StepBatches) -> loop.Step:
        nonlocal step
        step = item.step
        world.append(run.accelerator.num_processes)
        if RANK == 1 and asked.get("stop") == str(step):
            signal.raise_signal(signal.SIGINT)
        return one_step(run, item)

    def watched_backward(run: loop.Run, batch: Any, *, weight: float) -> Any:
        seen.append((step, [f"{draw.epoch}:{draw.repeat}:{draw.sample.key}" for draw in batch.samples]))
        if RANK == 1 and asked.get("nan") == str(step):
            weight = float("nan")
        return backward(run, batch, weight=weight)

    def watched_replace(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        replace(source, target)

    errors = io.StringIO()
    with (
        mock.patch.object(loop, "optimizer_step", watched_step),
        mock.patch.object(loop, "backward", watched_backward),
        mock.patch.object(os, "replace", watched_replace),
        mock.patch.dict(os.environ, {f"ACCELERATE_USE_{kind.upper()}": "true" for kind in asked if kind in SHARING}),
        mock.patch.object(PartialState, "destroy_process_group"),  # for the next run
        mock.patch.object(processes, "_PATIENCE", 0.0),  # no launcher ends this one
        contextlib.redirect_stderr(errors),
    ):
        code = main(given)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the next run may read what the first process has written
    AcceleratorState._reset_state(reset_partial_state=False)
    return {"code": code, "error": errors.getvalue(), "seen": seen, "written": written, "world": sorted(set(world))}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, words in json.loads((folder / "runs.json").read_text()).items():
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(observed(words)))
