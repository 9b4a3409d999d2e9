"""CUDA's particulars: copies that do not stop the GPU, the same bits in every run, errors in plain words."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS reads it at its first call; recent GPUs use this value by default."""

_FILL = "fill_uninitialized_memory"  # a property of the module's class, which type checkers do not see


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the copy is queued behind the GPU's pending work.

    A copy from ordinary memory would make the host wait until that work is done, and the GPU would then wait for the
    host. torch keeps the pinned memory until it has been read.
    """
    import torch

    has_memory = type(tensor) is torch.Tensor  # fake tensors have none
    if device.type == "cuda" and tensor.device.type == "cpu" and has_memory:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are: all in one place."""
    return next(module.parameters()).device


def settle(*, deterministic: bool, allow_tf32: bool) -> None:
    """Set the rules by which CUDA's algorithms are chosen in this process; to be called before the first of them runs.

    `deterministic`: only those that give the same bits each time. By default cuDNN's and the attention kernels'
    backward passes add in any order. `allow_tf32`: products of fp32 numbers in TF32, with ten bits of mantissa; torch
    allows it to convolutions by default.
    """
    import torch

    if deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    setattr(torch.utils.deterministic, _FILL, False)  # with NaN, which costs a pass over every new tensor
    with warnings.catch_warnings():  # the newer settings cannot be mixed with these, which torch's compiler reads
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # torch's compiler recommends them


def kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A context after which torch's streams of random numbers, on the CPU and on `device`, are as they were before."""
    import torch

    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def unscale_fp16(scaler: torch.amp.GradScaler) -> None:
    """Have the scaler divide gradients in fp16 too. torch refuses that by default, because they can then underflow to
    0; --full_fp16 accepts that to save memory, as in kohya's scripts."""
    unscale = scaler._unscale_grads_

    def unscale_all(
        optimizer: torch.optim.Optimizer, inverse: Tensor, found: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return unscale(optimizer, inverse, found, True)

    vars(scaler)["_unscale_grads_"] = unscale_all  # of this scaler alone


def explained(error: BaseException) -> str | None:
    """The cause in plain words and a remedy, if `error` is one of CUDA's that options can avoid; else None."""
    reason = str(error).strip().split("\n")[0]
    if "deterministic" in reason and "use_deterministic_algorithms" in reason:
        return f"{reason.split(',')[0]}. --no-deterministic lets it run; two runs may then differ in their last digits"
    return None
