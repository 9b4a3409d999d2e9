"""Encode once, keep in memory. Gets functions, not models. `disk_cache.py` does the same on disk."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor

from library.cpus import thread_count
from library.data.caches.rows import stacked
from library.data.images import load_pixels
from library.data.samples import Size
from library.data.views import View
from library.errors import UserError
from library.progress import bar

logger = logging.getLogger(__name__)


class LatentCache:
    """(mean, std) of the latents of each view: the distribution, not a draw from it, so that training on the cache
    equals training without and no seed is baked in. One tensor [N, C, h, w] a bucket size, on the CPU."""

    def __init__(self, rows: dict[View, int], moments: dict[Size, tuple[Tensor, Tensor]]) -> None:
        self._rows = rows
        self._moments = moments

    def get(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """(mean, std), each [B, C, h, w], of views of one size."""
        mean, std = self._moments[views[0].size]
        rows = [self._rows[view] for view in views]
        return mean[rows], std[rows]

    @property
    def nbytes(self) -> int:
        return sum(mean.nbytes + std.nbytes for mean, std in self._moments.values())


class TextCache:
    """The states of each caption: its tensors by name, on the CPU."""

    def __init__(self, outputs: dict[str, dict[str, Tensor]]) -> None:
        self._outputs = outputs

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Name → [B, …]; see `rows.stacked`."""
        found = [self._outputs[caption] for caption in captions]
        return {name: stacked([one[name] for one in found]) for name in found[0]}

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for own in self._outputs.values() for output in own.values())


@torch.no_grad()
def encode_images(
    views: Iterable[View], encode: Callable[[Tensor], tuple[Tensor, Tensor]], *, batch_size: int
) -> LatentCache:
    """Encode each distinct view once, in batches of one size. The latents keep the dtype that `encode` returns.

    `encode` takes pixels float32 [B, 3, H, W] in [-1, 1] on the CPU and returns (mean, std), each [B, C, h, w].
    Threads decode the images of the next batches meanwhile. Raises UserError where a latent is not finite.
    """
    distinct = list(dict.fromkeys(views))
    counts = Counter(view.size for view in distinct)
    filled: Counter[Size] = Counter()
    rows: dict[View, int] = {}
    moments: dict[Size, tuple[Tensor, Tensor]] = {}
    for batch, mean, std in encoded_images(distinct, encode, batch_size=batch_size, load=load_pixels):
        size = batch[0].size
        if size not in moments:  # only the encoder knows the shape
            moments[size] = _room(mean, counts[size]), _room(std, counts[size])
        start, end = filled[size], filled[size] + len(batch)
        for room, new in zip(moments[size], (mean, std), strict=True):
            room[start:end] = new
        rows.update(zip(batch, range(start, end), strict=True))
        filled[size] = end
    cache = LatentCache(rows, moments)
    logger.info("latents of %d images held in memory: %.1f MB", len(rows), cache.nbytes / 1e6)
    return cache


def encoded_images(
    views: Sequence[View],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    load: Callable[[View], Tensor],
) -> Iterator[tuple[list[View], Tensor, Tensor]]:
    """(views, mean, std) of batches of one size; see `encode_images`. `load` gives pixels, in several threads."""
    by_size: dict[Size, list[View]] = {}
    for view in views:
        by_size.setdefault(view.size, []).append(view)
    batches = [same[i : i + batch_size] for same in by_size.values() for i in range(0, len(same), batch_size)]
    ordered = [view for batch in batches for view in batch]
    with closing(_read_ahead(ordered, load, ahead=2 * batch_size)) as pixels:
        for batch in bar(batches, desc="encoding images", total=len(batches), unit="batch"):
            mean, std = encode(torch.stack(list(islice(pixels, len(batch)))))
            refuse_non_finite([str(view.path) for view in batch], mean, std)
            yield batch, mean, std


@torch.no_grad()
def encode_captions(
    captions: Iterable[str], encode: Callable[[list[str]], dict[str, Tensor]], *, batch_size: int
) -> TextCache:
    """Encode each distinct caption once. `encode` returns name → [B, …]; the second axis may differ between batches."""
    distinct = list(dict.fromkeys(captions))
    outputs: dict[str, dict[str, Tensor]] = {}
    for batch, found in encoded_captions(distinct, encode, batch_size=batch_size):
        on_cpu = {name: output.cpu() for name, output in found.items()}
        for row, caption in enumerate(batch):
            outputs[caption] = {name: output[row].clone() for name, output in on_cpu.items()}
    cache = TextCache(outputs)
    logger.info("text encoder outputs of %d captions held in memory: %.1f MB", len(distinct), cache.nbytes / 1e6)
    return cache


def encoded_captions(
    captions: Sequence[str], encode: Callable[[list[str]], dict[str, Tensor]], *, batch_size: int
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """(captions, name → [B, …]) of batches."""
    starts = range(0, len(captions), batch_size)
    for start in bar(starts, desc="encoding captions", total=len(starts), unit="batch"):
        batch = list(captions[start : start + batch_size])
        yield batch, encode(batch)


def _room(like: Tensor, count: int) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device="cpu")


def _read_ahead(views: Sequence[View], load: Callable[[View], Tensor], *, ahead: int) -> Generator[Tensor, None, None]:
    """The pixels of each view, in order. At most `ahead` images, and one for each thread, are decoded in advance."""
    threads = thread_count()
    waiting: deque[Future[Tensor]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for view in views:
            if len(waiting) >= ahead + threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(load, view))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_non_finite(images: Sequence[str], mean: Tensor, std: Tensor) -> None:
    """Raises UserError that names the images whose latents are not finite."""
    finite = mean.isfinite().flatten(1).all(1) & std.isfinite().flatten(1).all(1)
    bad = dict.fromkeys(image for image, good in zip(images, finite.tolist(), strict=True) if not good)
    if bad:
        raise UserError(f"the VAE returns latents that are not finite for {', '.join(bad)}: in fp16 try --no_half_vae")
