"""The denoiser's blocks, compiled one by one ("regional compilation"), with the adapters inside.

Blocks of equal sizes share a graph, so that the time of compiling does not grow with the number of blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch._dynamo

from library.errors import UserError
from library.parallel import shard

if TYPE_CHECKING:
    from library.config.options import Options
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_VARIANTS = 8  # of a block's graph: with and without gradients, with the adapter off, a batch of one, ...
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_DYNAMIC = {None: None, "auto": None, "true": True, "false": False}


def refuse_what_cannot_be(options: Options, device: torch.device) -> None:
    """UserError for options beside compilation that are not supported, and if this machine has no compiler."""
    wanted = options.compile
    if not wanted.is_asked_for:
        return
    if shard.is_asked_for():
        raise UserError(f"--{wanted.option} with FSDP: blocks whose weights are gathered at each use are not compiled")
    for option in ("blocks_to_swap", "cpu_offload_checkpointing"):
        if getattr(options.precision, option):
            raise UserError(
                f"--{option} with --{wanted.option}: copies beside a compiled block are not supported; give one"
            )
    if wanted.backend == "inductor" and (lack := _lacking(device)):
        raise UserError(f"--{wanted.option}: {lack}")
    if wanted.compile_mode in _WITH_CUDA_GRAPHS and device.type == "cuda":
        raise UserError(
            f"--compile_mode {wanted.compile_mode}: its CUDA graphs reuse the memory of a block's output, which later "
            "blocks still need; use max-autotune-no-cudagraphs or default"
        )


def _lacking(device: torch.device) -> str:
    """What inductor needs on this device and does not find, and how to get it; "" if it has all."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return (
                "compiling for a GPU needs Triton, which is missing or does not support this GPU: pip install triton "
                "(on Windows triton-windows)"
            )
        return ""
    if device.type == "mps":
        return ""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "compiling for a CPU needs a C++ compiler, and none is found: install g++ (Debian, Ubuntu: apt install "
            "g++; macOS: xcode-select --install; Windows: the Visual Studio Build Tools), or name one in the "
            "environment variable CXX"
        )
    return ""


def compile_blocks(family: ModelFamily, options: Options) -> None:
    """Have each block compiled at its first use. After the network is attached: its layers become part of the graphs.

    Raises torch's errors in the first steps, not here (see `naming_errors`).
    """
    wanted, blocks = options.compile, list(family.compiled_blocks())
    # blocks of all sizes share a limit, for they share a class; beyond it a block would run uncompiled
    limit = wanted.compile_cache_size_limit or _VARIANTS * len(blocks)
    config = torch._dynamo.config
    config.recompile_limit = limit
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    mode = {} if wanted.compile_mode == "default" else {"mode": wanted.compile_mode}
    for block in blocks:
        block.compile(
            backend=wanted.backend,
            dynamic=_DYNAMIC[wanted.compile_dynamic],
            fullgraph=wanted.compile_fullgraph,
            **mode,
        )
    logger.info("%d blocks are compiled with %s in the first steps", len(blocks), wanted.backend)


@contextmanager
def naming_errors(options: Options) -> Iterator[None]:
    """Errors of compiling inside become a `UserError`."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--{options.compile.option}: {_in_short(error)}. Training without it works") from error


def _in_short(error: Exception) -> str:
    """The first two lines of torch's message, and the line of code that it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    code = [line for line in lines if line.startswith("File ")]
    return " ".join([*lines[:2], *(f"({line})" for line in code[-1:])]).rstrip(".")
