"""Masks that weigh the loss: 1 where the image is learnt, 0 where it is not. They follow the pixels of their view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from library.cpus import thread_count
from library.data.images import load_mask
from library.data.samples import Size
from library.data.views import View
from library.progress import bar


class MaskCache:
    """The mask of each view at the size of its latents: one tensor [N, 1, h, w] a bucket size, on the CPU."""

    def __init__(self, rows: dict[View, int], masks: dict[Size, Tensor]) -> None:
        self._rows = rows
        self._masks = masks

    def get(self, views: Sequence[View]) -> Tensor | None:
        """float32 [B, 1, h, w] in 0 … 1 for views of one size; None where none of them is masked."""
        if not any(view.masked for view in views):
            return None
        masks = self._masks[views[0].size]
        return torch.stack([masks[self._rows[v]] if v.masked else torch.ones_like(masks[0]) for v in views])

    @property
    def nbytes(self) -> int:
        return sum(masks.nbytes for masks in self._masks.values())


def latent_mask(view: View, size: tuple[int, int]) -> Tensor:
    """The mask of a view, float32 [1, h, w] in 0 … 1: each latent cell the mean over its pixels.

    `size` is the latents' (h, w). Parts without a mask are 1. Raises UserError if the file can no longer be read.
    """
    return torch.nn.functional.interpolate(load_mask(view)[None], size=size, mode="area")[0]


def cache_masks(views: Iterable[View], latent_size: Callable[[View], tuple[int, int]]) -> MaskCache:
    """Read the mask of each distinct masked view once; `latent_size` returns the (h, w) of a view's latents."""
    by_size: dict[Size, list[View]] = {}
    for view in dict.fromkeys(views):
        if view.masked:
            by_size.setdefault(view.size, []).append(view)
    rows: dict[View, int] = {}
    masks: dict[Size, Tensor] = {}
    with ThreadPoolExecutor(thread_count()) as pool:
        for size, same in by_size.items():
            cells = latent_size(same[0])
            read = pool.map(lambda view, cells=cells: latent_mask(view, cells), same)
            found = list(bar(read, desc="masks", total=len(same), unit="img"))
            masks[size] = torch.stack(found)
            rows.update((view, row) for row, view in enumerate(same))
    return MaskCache(rows, masks)
