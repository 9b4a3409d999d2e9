"""Arithmetic that is the same on every x86-64 machine, as far as libraries allow.

Run with `ENVIRONMENT`, set before torch is imported, MKL, oneDNN, ATen, numpy and glibc leave out the instructions
that not every processor has: with these a sum is added up in another order, and its last bits are others.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMPILER = Path(__file__).parent / "bin"  # a c++ whose code does not depend on the processor either
PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "numpy", "pillow"),
    *("lion-pytorch", "prodigyopt", "schedulefree", "lycoris-lora"),
)
ENVIRONMENT = {
    # one thread: sums are not split over however many there are
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",  # the only one of MKL's branches that AMD's processors have as well
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-AVX,-FMA,-FMA4",
    # no GPU, no network, and messages that do not depend on who looks
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONWARNINGS": "ignore::ImportWarning",  # numpy's, about processors that lack what is disabled here
    "COLUMNS": "100",
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
}


_KEPT: list[Any] = []  # as long as the process lives


def environment() -> dict[str, str]:
    """That of a process that is measured: nothing of the caller's that training or its messages could depend on."""
    kept = {
        name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ
    }
    path = os.pathsep.join((str(COMPILER), os.environ.get("PATH", os.defpath)))
    return kept | ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(ROOT)}


def versions() -> dict[str, str]:
    """Of what computes, and of Python, whose `sum` of floats has changed once."""
    return {"Python": ".".join(map(str, sys.version_info[:2]))} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    """Without what the build is for: "2.13.0" for "2.13.0+cpu"."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return ""


def prepare_torch() -> None:
    """What no variable reaches. Square roots are correctly rounded in IEEE 754, but not MKL's: its vector functions
    begin with the processor's approximation of 1/sqrt, which Intel and AMD do not share."""
    import warnings

    import numpy as np
    import torch

    def sqrt(x: torch.Tensor) -> torch.Tensor:
        kind = x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()
        wide = x.detach().to(torch.promote_types(kind, torch.float32))
        return torch.from_numpy(np.asarray(np.sqrt(wide.numpy()))).to(kind)

    def into(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.resize_(x.shape).copy_(sqrt(x))

    overrides = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overrides.impl("sqrt", sqrt, "CPU")
        overrides.impl("sqrt_", lambda x: x.copy_(sqrt(x)), "CPU")
        overrides.impl("sqrt.out", into, "CPU")
    _KEPT.append(overrides)
    torch.backends.nnpack.set_flags(False)  # it has code for AVX2 only
