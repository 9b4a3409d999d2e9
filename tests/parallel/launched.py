"""A process of a run that `accelerate launch` starts, with something that happens to it in its third step.

`launched.py WHAT WORDS…`: "signals": both processes get a SIGINT, and the first takes its time to save; "killed": the
second is killed. The other words are the command line's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from library.training import loop, state
from train_network import main

what, words = sys.argv[1], sys.argv[2:]
one_step, write = loop.optimizer_step, state.write


def step(run: loop.Run, item: loop.StepBatches) -> loop.Step:
    if item.step == 3 and what == "signals":
        signal.raise_signal(signal.SIGINT)
    if item.step == 3 and what == "killed" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return one_step(run, item)


def slow_write(*args: Any) -> None:
    if what == "signals":
        time.sleep(2)  # the launcher looks ten times a second whether a process has ended
    write(*args)


loop.optimizer_step, state.write = step, slow_write
code = main(words)
print(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} ends with {code}", flush=True)
sys.exit(code)
