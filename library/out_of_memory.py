"""Memory that runs out, on a GPU or of the computer: recognised once, and named after the part of the run that grew."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from library.units import human_bytes

LESS_MEMORY = (
    "Each of these needs less: --gradient_checkpointing, a smaller --train_batch_size or --vae_batch_size, "
    "--mixed_precision bf16, --cache_latents, --network_train_unet_only with --cache_text_encoder_outputs, --fp8_base, "
    "--optimizer_type AdamW8bit; --dry_run computes how much"
)
"""The advice where no verdict can be computed for the run."""

_ON_CPU = "DefaultCPUAllocator"  # "can't allocate memory", on Windows "not enough memory"
_ON_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")


class OutOfMemory(Exception):
    """A part of the run needs more memory than there is.

    `part`: "step 3", "loading the UNet"; "" if unknown. `done`: the number of steps that the weights have; None if the
    error was outside of training. `is_whole`: False if it came in the middle of the optimizer's step, which may have
    changed some of the weights. `kept`: a sentence about what was saved, "" for none.
    """

    def __init__(self, part: str, reason: str, *, done: int | None = None, is_whole: bool = True) -> None:
        super().__init__(part, reason)
        self.part, self.reason, self.done, self.is_whole, self.kept = part, reason, done, is_whole, ""

    def __str__(self) -> str:
        named = f"{self.part}: {self.reason}" if self.part else self.reason
        return f"{named}. {self.kept}" if self.kept else named


@contextmanager
def during(part: str, *, done: int | None = None, is_whole: bool = True) -> Iterator[None]:
    """Errors of memory inside become an `OutOfMemory` of this part; of nested parts the innermost is named.

    The local variables of the failed calls are dropped, so that their tensors do not fill the memory any longer.
    """
    try:
        yield
    except OutOfMemory as error:
        if error.done is None:
            error.done = done
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        if (reason := reason_of(error)) is None:
            raise
        traceback.clear_frames(error.__traceback__)
        _empty_cache()
        raise OutOfMemory(part, reason, done=done, is_whole=is_whole) from None


def reason_of(error: BaseException) -> str | None:
    """Whose memory is too small, the requested and the free memory, if `error` is one of memory; else None."""
    text = str(error).strip()
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or any(
        words in text for words in _ON_DEVICE
    ):
        return f"the GPU's memory is too small: {_of_device(text)}"
    is_full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if is_full or isinstance(error, MemoryError) or (type(error) is RuntimeError and _ON_CPU in text):
        return f"the computer's memory is too small: {_of_computer(text)}"
    return None


def _of_device(text: str) -> str:
    """The requested and the free memory, cut out of torch's much longer message."""
    sentences = text.split("\n")[0].removeprefix("CUDA out of memory. ").split(". ")
    return ". ".join(sentences[:2]).strip().rstrip(".")


def _of_computer(text: str) -> str:
    import psutil

    free = f"{human_bytes(psutil.virtual_memory().available)} are free"
    if asked := re.search(r"allocate (\d+) bytes", text):
        return f"{human_bytes(int(asked[1]))} were asked for, {free}"
    if asked := re.search(r"allocate ([\d.]+ [KMGTPE]?i?B)", text):
        return f"{asked[1]} were asked for, {free}"
    return free


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
