"""Decode the images of coming batches in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from library.cpus import cpu_count
from library.data.images import load_view
from library.data.views import View
from library.errors import UserError

Views = Sequence[View]
Pixels = tuple[Tensor, "Tensor | None"]
"""float32 [B, 3, H, W] in [-1, 1], and masks [B, 1, H, W] in 0 … 1 or None where no view has one."""


class _Pixels(Dataset["Pixels | UserError"]):
    """Its index is the batch's own description: workers hold no data, whether forked or spawned.

    A UserError is returned: torch would put the worker's traceback into its message.
    """

    def __getitem__(self, views: Views) -> Pixels | UserError:
        try:
            loaded = [load_view(view) for view in views]
        except UserError as error:
            return error
        pixels = torch.stack([pixels for pixels, _ in loaded])
        if not any(view.masked for view in views):
            return pixels, None
        return pixels, torch.stack([torch.ones_like(p[:1]) if mask is None else mask for p, mask in loaded])


class _Order:
    """The sampler: the batches to come. Workers that persist outlive an epoch, so it can be given new ones."""

    def __init__(self) -> None:
        self.batches: Iterable[Views] = ()

    def __iter__(self) -> Iterator[Views]:
        return iter(self.batches)


class PixelLoader:
    """Batches of views → batches of pixels, in order, the same for any number of workers.

    `workers` is an upper bound, as are the number of CPUs and `most_batches`, the batches of an epoch.
    `pin`: put the pixels into pinned memory, from which a GPU reads by itself.
    """

    def __init__(self, *, workers: int, most_batches: int, persistent: bool = False, pin: bool = False) -> None:
        self.workers = min(workers, cpu_count(), most_batches)
        self._order = _Order()
        self._loader = DataLoader(
            _Pixels(),
            batch_size=None,
            sampler=self._order,
            num_workers=self.workers,
            persistent_workers=persistent and self.workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),  # else each epoch would take a number from torch's global stream
        )

    def __call__(self, batches: Iterable[Views]) -> Iterator[Pixels]:
        """Pixels and masks of each of `batches`. Raises UserError for a file that can no longer be read."""
        self._order.batches = batches
        return map(_good, iter(self._loader))


def _good(loaded: Pixels | UserError) -> Pixels:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded
