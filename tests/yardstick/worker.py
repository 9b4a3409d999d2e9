"""The process that runs the program for the yardstick, started with `arithmetic.ENVIRONMENT`.

    python -m tests.yardstick.worker                      takes orders on stdin, a JSON object a line
    python -m tests.yardstick.worker MODULE WORD …        does one, as `python -m MODULE WORD …` would

An order is done in a fork of a process that has imported everything and run nothing: no run sees what an earlier one
has left in memory, and none but the first pays for the imports.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tests.yardstick import arithmetic

HEAVY = (  # to import at once, before the first run
    *("torch", "torch._dynamo", "accelerate", "safetensors.torch", "bitsandbytes", "tokenizers"),
    *("transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.optimization"),
)
LONGEST = 600  # seconds that a command may take
PROGRAMS = ("train_network", "sdxl_train_network", "networks.tools.convert")


def run_module(module: str, *words: str) -> None:
    """As `python -m module words`."""
    arithmetic.prepare_torch()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def in_fork(work: Callable[[], object], *, stdout: str, stderr: str) -> tuple[int, float, list[str]]:
    """Run `work` in a fork whose output goes to files. Returns its exit code (minus a signal's number), its CPU
    seconds, and the modules that it imported."""
    before = os.times()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        for path, number in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        signal.alarm(LONGEST)  # which ends it
        known = set(sys.modules)
        code = _finish(work)
        with os.fdopen(writing, "w") as names:
            print(*(name for name in sys.modules if name not in known), file=names)
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as names:
        imported = names.read().split()
    _, status = os.waitpid(pid, 0)
    after = os.times()
    return os.waitstatus_to_exitcode(status), after[2] + after[3] - before[2] - before[3], imported


def _finish(work: Callable[[], object]) -> int:
    """The exit code that Python would end with."""
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code or 0


def do(order: dict[str, Any]) -> dict[str, Any]:
    """One order: "prepare" a base, write the "canary", or run a "module" with "words", in or into a "folder"."""

    def work() -> None:
        from tests.yardstick import bases, canary

        if "prepare" in order:
            bases.write(order["prepare"], order["folder"])
        elif "canary" in order:
            canary.write(order["canary"])
        else:
            os.chdir(order["folder"])
            run_module(order["module"], *order["words"])

    code, seconds, imported = in_fork(work, stdout=order.get("stdout", os.devnull), stderr=order["stderr"])
    if "module" in order:
        import_too(imported)
    return {"code": code, "seconds": seconds}


def import_too(names: Sequence[str]) -> None:
    """Import what a run has imported, but for the program that it was started with: the next ones find it there."""
    for name in names:
        if name not in PROGRAMS and not name.startswith("tests."):
            try:
                importlib.import_module(name)
            except Exception:  # a module that only its parent can make
                continue
    gc.collect()
    gc.freeze()


def serve() -> None:
    """Do orders from stdin, and answer each on stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import_too(HEAVY)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_module(*sys.argv[1:])
    else:
        serve()
