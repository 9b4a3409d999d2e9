"""All that a machine with an NVIDIA GPU should run: the tests, then the benchmark. Results and logs go to one folder.

    python3 -m benchmarks.on_gpu --out FOLDER            # both: about ten minutes on an H100, by estimate
    python3 -m benchmarks.on_gpu --out FOLDER tests      # or one of the two
    python3 -m benchmarks.on_gpu --out FOLDER benchmark

FOLDER gets environment.txt, tests.log, benchmark.log, gpu.json and gpu.md. It may be given as $OUT too. A second call
with the same folder goes on with the benchmark's parts that are not there yet. Needs no network; docs/gpu.md says what
must be installed. Tests that share the card run side by side where pytest-xdist is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINE = """
import importlib.metadata, os, platform, torch
print(platform.platform(), "Python", platform.python_version(), os.cpu_count(), "CPUs")
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
for index in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(index)
    print(card.name, card.total_memory, "bytes", f"{card.major}.{card.minor}", card.multi_processor_count, "processors")
for name in ("diffusers", "transformers", "accelerate", "bitsandbytes", "peft", "triton", "deepspeed"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
"""


def logged(log: Path, *command: str) -> int:
    """Run it in the root; what it prints goes to the console and the log. Returns its exit code."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        while piece := process.stdout.read1():  # type: ignore[attr-defined]
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
            file.write(piece)
            file.flush()
    print(f"{log.name}: ended with {process.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tests", "benchmark"), help="only this")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="the folder for results")
    parser.add_argument("--processes", type=int, default=4, help="that test side by side")
    parser.add_argument("--seconds", type=float, default=330, help="after which no part of the benchmark is started")
    parser.add_argument("--tiny", action="store_true", help="only to see whether it runs, on a CPU if need be")
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out: no folder is given, and $OUT is not set")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    codes = [logged(out / "environment.txt", "-c", MACHINE)]
    if options.what != "benchmark":
        side_by_side = ("-n", str(options.processes), "--dist", "worksteal")
        more = side_by_side if importlib.util.find_spec("xdist") is not None else ()
        codes.append(
            logged(out / "tests.log", "-m", "pytest", "-m", "gpu", "tests/gpu", "-rsP", "--durations=15", *more)
        )
    if options.what != "tests":
        tiny = ("--tiny",) if options.tiny else ()
        words = ("--out", str(out), "--seconds", str(options.seconds), *tiny)
        codes.append(logged(out / "benchmark.log", "-m", "benchmarks.gpu", *words))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
