"""Kills a training again and again with SIGKILL, resumes it each time, and checks what lies there in between.

`python killed.py FOLDER TRIES SEED` trains on `FOLDER/data` into `FOLDER/out` until it has been killed so often, and
prints what happened as JSON. A first short run imports everything, and every try is a fork, so a try takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from safetensors import safe_open  # noqa: E402

from library.files.hashes import safetensors_hashes  # noqa: E402
from library.record import saves as save  # noqa: E402
from library.training import state  # noqa: E402
from tests.conftest import PATIENCE  # noqa: E402
from train_network import main  # noqa: E402

STEPS = 10_000  # never reached


def words(folder: Path, *more: str) -> list[str]:
    """A run that saves after every step, so that much of its time is spent saving."""
    return [
        *("--pretrained_model_name_or_path", str(ROOT / "quickstart" / "base")),
        *("--train_data_dir", str(folder / "data"), "--caption_extension", ".txt", "--resolution", "64"),
        *("--output_dir", str(folder / "out"), "--output_name", "test", "--network_dim", "16", "--seed", "1"),
        *("--learning_rate", "1e-3", "--no-loss_plot", "--cache_latents", "--max_data_loader_n_workers", "0"),
        *("--max_train_steps", str(STEPS), "--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "2"),
        *("--shuffle_caption", *more),
    ]


def start(folder: Path, *more: str) -> int:
    """The process id of a child that trains."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 1
    try:
        code = main(words(folder, *more))
    finally:
        os._exit(code)


def unfinished(out: Path) -> list[str]:
    """Networks and states that are being written, replaced or removed; the run's record is written all the time."""
    found = [path for path in out.glob(".*") if set(path.suffixes) & {".part", ".old", ".gone"}]
    return [path.name for path in found if not path.name.endswith("-run.part.json")]


def kill(child: int, out: Path, *, inside_a_save: bool) -> bool:
    """Kill it, at the next sign of a save if that is asked for; whether it was saving."""
    deadline = time.monotonic() + PATIENCE
    while inside_a_save and not unfinished(out) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bool(unfinished(out))


def wait_for_a_step(out: Path) -> None:
    """Until the child has trained and saved something, however slow the machine is."""
    before, deadline = newest_state(out), time.monotonic() + PATIENCE
    while newest_state(out) == before and time.monotonic() < deadline:
        time.sleep(0.01)


def newest_state(out: Path) -> str:
    return max((path.name for path in out.glob("*-state")), default="")


def check(out: Path) -> int:
    """Every LoRA and every state that is there is whole; the newest state's step, 0 if there is none."""
    newest = 0
    for path in out.iterdir():
        if path.suffix == ".safetensors" and not path.name.startswith("."):
            save.check_finite(path, path.name, None)
            with safe_open(path, framework="pt") as file:
                assert file.metadata().items() >= safetensors_hashes(path).items(), path
        if save.is_state_name(path.name, "test"):
            facts = state._read_facts(path)
            tensors = torch.load(path / state.TENSORS, weights_only=True)
            assert len(tensors["losses"]) == facts.step
            newest = max(newest, facts.step)
    return newest


def torture(folder: Path, tries: int, seed: int) -> dict[str, object]:
    """Kill `tries` times: of four, one at any moment since the start, one while it trains, two inside a save."""
    out, draw = folder / "out", random.Random(seed)
    out.mkdir()
    main(words(folder, "--max_train_steps", "1", "--output_dir", str(folder / "first"), "--no-save_state"))
    AcceleratorState._reset_state(reset_partial_state=True)
    saving, reached = 0, [0]
    for number in range(tries):
        child = start(folder, *(("--resume", "latest") if reached[-1] else ("--overwrite",)))
        if number % 4 == 0:
            time.sleep(draw.uniform(0, 3))
        else:
            wait_for_a_step(out)
            time.sleep(draw.uniform(0, 0.5))
        saving += kill(child, out, inside_a_save=number % 2 == 1)
        reached.append(check(out))
        assert reached[-1] >= reached[-2], "a state that was there is gone"
    return {"tries": tries, "inside_a_save": saving, "reached": reached}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = torture(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(report))
