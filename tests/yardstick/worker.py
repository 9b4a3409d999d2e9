"""The process that runs the program for the yardstick, started with `arithmetic.ENVIRONMENT`.

    python -m tests.yardstick.worker                      takes orders on stdin, a JSON object a line
    python -m tests.yardstick.worker MODULE WORD …        does one, as `python -m MODULE WORD …` would

An order is done in a fork of a process that has imported torch and the like already, but nothing of the program: no
run sees what an earlier one has left in memory, and none pays for the imports.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tests.yardstick import arithmetic

HEAVY = (  # of the packages that the program uses
    *("torch", "torch._dynamo", "accelerate", "safetensors.torch", "bitsandbytes", "tokenizers"),
    *("transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.optimization"),
)


def run_module(module: str, *words: str) -> None:
    """As `python -m module words`."""
    arithmetic.prepare_torch()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def in_fork(work: Callable[[], object], *, stdout: str = os.devnull, stderr: str = os.devnull) -> tuple[int, float]:
    """Run `work` in a fork whose output goes to files. Returns its exit code (minus a signal's number) and its CPU
    seconds."""
    before = os.times()
    pid = os.fork()
    if pid == 0:
        for path, number in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        os._exit(_finish(work))
    _, status = os.waitpid(pid, 0)
    after = os.times()
    return os.waitstatus_to_exitcode(status), after[2] + after[3] - before[2] - before[3]


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
    """One order: "prepare" folders of models, show the "canary", or run a "module" with "words" in "folder"."""
    if "prepare" in order:
        from tests.yardstick import bases

        code, _ = in_fork(lambda: bases.write(order["prepare"], order["folder"]), stderr=order["stderr"])
        return {"code": code}
    if "canary" in order:
        from tests.yardstick import canary

        code, _ = in_fork(lambda: canary.write(order["canary"]), stderr=order["stderr"])
        return {"code": code}

    def work() -> None:
        os.chdir(order["folder"])
        run_module(order["module"], *order["words"])

    code, seconds = in_fork(work, stdout=order["stdout"], stderr=order["stderr"])
    return {"code": code, "seconds": seconds}


def serve() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_module(*sys.argv[1:])
    else:
        serve()
