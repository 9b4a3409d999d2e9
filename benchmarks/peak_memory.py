"""Peak memory and time to the first step of whole processes at the true SD 1.5 size, against the bare loop.

    python -m benchmarks.peak_memory [--folder output/sd15]

Ours loads, encodes eight images and trains three steps; the bare loop trains three steps on random latents. Both are
started anew for each row, so loading and caching are included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import sd15_folder
from benchmarks.step_time import SETTINGS, image_folder, words

ROOT = Path(__file__).parent.parent

# Runs in a process of its own: the whole job, then its costs.
WATCHED = """
import json, resource, sys, time
start = time.perf_counter()
from library.training import loop
step, first = loop.optimizer_step, []
def watched(run, item):
    loss = step(run, item)
    first.append(time.perf_counter() - start)
    return loss
loop.optimizer_step = watched
from train_network import main
assert main(sys.argv[1:]) == 0
print(json.dumps({"first_step_s": first[0], "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def measured(*command: str) -> dict[str, float]:
    """The JSON line that ends the output of a Python process."""
    result = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    numbers: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    parser.add_argument("--only", choices=SETTINGS, action="append")
    options = parser.parse_args()
    model = sd15_folder(options.folder)

    print("| | ours, GiB | bare loop, GiB | ratio | ours: start to end of first step, s |\n|---|---|---|---|---|")
    for name in options.only or SETTINGS:
        flags, bare = SETTINGS[name]
        with tempfile.TemporaryDirectory() as temporary:
            data = image_folder(Path(temporary) / "data")
            command = [
                *words(model, data, Path(temporary) / "out", options.resolution),
                *flags,
                "--max_train_steps",
                "3",
            ]
            ours = measured("-c", WATCHED, *command)
        peer_flags = [f"--{flag}" for flag in bare]
        resolution = ("--resolution", str(options.resolution), "--steps", "3")
        peer = measured("-m", "benchmarks.bare_loop", str(model), *resolution, *peer_flags)
        ratio = ours["peak_gib"] / peer["peak_gib"]
        print(
            f"| {name} | {ours['peak_gib']:.2f} | {peer['peak_gib']:.2f} | {ratio:.3f} | {ours['first_step_s']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
