"""Autocast as a GPU has it, for passes that count as on the CPU.

torch's lists of what autocast computes in fp32 differ: on a GPU the norms are on it, so that their outputs take twice
the memory. https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

IN_FP32 = ("group_norm", "layer_norm", "softmax", "log_softmax", "normalize", "mse_loss", "l1_loss", "smooth_l1_loss")
"""Those of the list that modules call."""


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """A context in which these are computed in fp32 where the CPU's autocast is on. Not a TorchFunctionMode, which
    backward passes leave when they compute checkpointed blocks again."""
    with ExitStack() as stack:
        for name in IN_FP32:
            stack.enter_context(patch.object(F, name, _as_on_gpu(getattr(F, name))))
        yield


def _as_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            args, kwargs = tree_map_only(Tensor, _in_fp32, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
