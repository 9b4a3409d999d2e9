"""Describes this machine to others, as text for a bug report: `python -m library.diagnose`.

Nothing missing is a failure: each probe is tried by itself, and its error is printed in its line. Folders of the user
are shortened to `~`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from library.units import human_bytes

if TYPE_CHECKING:
    import torch

PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers"),
    *("bitsandbytes", "peft", "lycoris-lora", "triton", "xformers", "numpy", "pillow"),
)
_LONGEST = 160  # characters of an error
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"),
    *("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "ACCELERATE_MIXED_PRECISION"),
)

Line = tuple[str, Callable[[], str]]


def report() -> str:
    """All lines, each with a label and the result of its probe."""
    return "\n".join(f"{label:<22}{_tried(probe)}" for label, probe in _lines())


def without_home(text: str) -> str:
    """The text with the user's home folder as `~`."""
    home = str(Path.home())
    for folder in dict.fromkeys((home, os.path.realpath(home), home.replace("\\", "/"))):
        if folder not in ("/", ""):
            text = text.replace(folder, "~")
    return text


def _tried(probe: Callable[[], str]) -> str:
    """The result of a probe in one line, or its error."""
    try:
        text = probe()
    except (Exception, SystemExit) as error:  # a broken installation raises anything
        text = f"no: {type(error).__name__}: {error}"
    text = without_home(" ".join(text.split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _lines() -> Iterator[Line]:
    yield "system", lambda: f"{platform.platform()}, {platform.machine()}"
    yield "Python", lambda: f"{platform.python_version()} ({platform.python_implementation()})"
    yield "CPU", _cpu
    yield "memory", _host_memory
    for name in PACKAGES:
        yield name, lambda name=name: _version(name)  # type: ignore[misc]
    for name in _VARIABLES:
        if name in os.environ:
            yield name, lambda name=name: os.environ[name]  # type: ignore[misc]
    yield "CUDA of torch", _cuda_version
    yield "cuDNN", _cudnn_version
    yield "driver", _driver
    yield from _devices()
    yield "torch.compile", _compiles
    yield "Triton", _triton
    yield "bitsandbytes works", _bitsandbytes
    yield "C++ compiler", _compiler
    yield "CustomAdamW's kernel", _kernel


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {capability}"


def _host_memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{human_bytes(memory.total)} in all, {human_bytes(memory.available)} free"


def _cuda_version() -> str:
    import torch

    hip = getattr(torch.version, "hip", None)
    return f"ROCm {hip}" if hip else torch.version.cuda or "none: this torch is for the CPU only"


def _cudnn_version() -> str:
    import torch

    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return "none" if version is None else str(version)


def _driver() -> str:
    """NVIDIA's own tool knows the driver's version; torch does not."""
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not there"
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
    )
    return ", ".join(dict.fromkeys((done.stdout or done.stderr).split("\n"))).strip(", ")


# -- devices


def _devices() -> Iterator[Line]:
    """The lines of each device: its memory, and the dtypes that a product of matrices works in."""
    import torch

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    for device in devices:
        if device.type == "cuda":
            yield f"{device}", lambda device=device: _card(device)  # type: ignore[misc]
            yield f"{device} memory", lambda device=device: _card_memory(device)  # type: ignore[misc]
        yield f"{device} dtypes", lambda device=device: _dtypes(device)  # type: ignore[misc]
    if len(devices) == 1:
        yield "GPU", lambda: "none that torch can use"


def _card(device: torch.device) -> str:
    import torch

    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, compute capability {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors"


def _card_memory(device: torch.device) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"{human_bytes(total)} in all, {human_bytes(free)} free; of this process {human_bytes(allocated)} allocated, "
        f"{human_bytes(reserved)} reserved"
    )


def _dtypes(device: torch.device) -> str:
    """Which dtypes work: a product of matrices, or for 8-bit floats the conversion that frozen weights need."""
    import torch

    return ", ".join(
        f"{name} {_works(lambda dtype=dtype: _product(dtype, device))}"  # type: ignore[misc]
        for name, dtype in {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp8": torch.float8_e4m3fn,
        }.items()
    )


def _product(dtype: torch.dtype, device: torch.device) -> None:
    import torch

    ones = torch.ones(16, 16, device=device).to(dtype)
    computed = ones.to(torch.bfloat16) if dtype == torch.float8_e4m3fn else ones
    found = (computed @ computed).float().cpu()
    if not torch.equal(found, torch.full((16, 16), 16.0)):
        raise ArithmeticError(f"wrong: {found[0, 0]:g} instead of 16")


def _works(probe: Callable[[], object]) -> str:
    try:
        probe()
    except Exception as error:
        return f"no ({type(error).__name__}: {' '.join(str(error).split())[:60]})"
    return "yes"


# -- compilers and kernels


def _compiles() -> str:
    import torch

    function = torch.compile(lambda x: (x * 2 + 1).relu())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(-4.0, 4.0, device=device)
    if not torch.equal(function(x), (x * 2 + 1).relu()):
        raise ArithmeticError("a compiled function returns other numbers")
    return f"yes, on {device}"


def _triton() -> str:
    import torch

    importlib.import_module("triton")
    if not torch.cuda.is_available():
        return "installed; not tried: it needs a GPU"
    from torch.utils._triton import has_triton

    return "yes" if has_triton() else "installed, but torch cannot use it"


def _bitsandbytes() -> str:
    """A tiny tensor packed into 4 bits and back, within the format's error."""
    import torch

    functional = importlib.import_module("bitsandbytes.functional")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64, device=device)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    if error > 0.16:  # half of NF4's widest gap, between -1 and -0.6962
        raise ArithmeticError(f"NF4 is off by {error:.2f}")
    return f"yes: NF4 on {device}"


def _compiler() -> str:
    """Its name and version; the kernel is compiled with it."""
    import subprocess

    from library.optimizers.custom_adamw.build import COMPILERS, find_compiler

    compiler = find_compiler()
    if compiler is None:
        return f"none of {', '.join(COMPILERS)}"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.splitlines()[0]


def _kernel() -> str:
    """The optimizer's kernel for the CPU, compiled if it is not yet, and one step of it."""
    import torch

    from library.optimizers.custom_adamw import native
    from library.optimizers.custom_adamw.optimizer import CustomAdamW

    try:
        native.library()
    except native.Unavailable as reason:
        return f"no: {reason}"
    weight = torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    CustomAdamW([weight], lr=0.1, weight_decay=0).step()
    if not torch.allclose(weight.detach(), torch.full((8,), 0.9), atol=1e-3):
        raise ArithmeticError(f"its first step gives {weight[0].item():.4f}, not 0.9")
    return "yes"


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    argparse.ArgumentParser(prog="python -m library.diagnose", description=__doc__.split("\n")[0]).parse_args(argv)
    logging.disable(logging.WARNING)  # packages log what they lack as they are imported
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
