"""Masks that weigh the loss: 1 where the image is learnt, 0 where it is not. They follow the pixels of their view."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.cpus import thread_count
from library.data.images import image_extensions, load_mask
from library.data.samples import Sample, Size
from library.data.views import View
from library.errors import UserError, nearest_path, told_apart
from library.paths import composed
from library.progress import bar

logger = logging.getLogger(__name__)
_SHOWN = 5


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


def find_masks(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of a subset, each with the image of the same name in `conditioning_data_dir` as its mask.

    Raises UserError where the folder or a mask is missing. Masks that belong to no image are counted in a warning.
    """
    subset = samples[0].subset if samples else None
    if subset is None or subset.conditioning_data_dir is None:
        return list(samples)
    place = f"{subset.origin}: conditioning_data_dir"
    folder = Path(subset.conditioning_data_dir)
    if not os.path.isdir(folder):
        raise UserError(f"{place}: no such folder: {folder}{nearest_path(folder)}")
    masks: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in image_extensions() and not path.name.startswith("."):
            stem = composed(path.stem)
            if stem in masks:
                two = " and ".join(told_apart([masks[stem].name, path.name]))
                raise UserError(f"{place}: '{stem}' has two masks: {two}")
            masks[stem] = path
    stems = {sample.path: composed(sample.path.stem) for sample in samples}
    missing = [path.name for path, stem in stems.items() if stem not in masks]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise UserError(f"{place}: {folder} has no image of the same name for {len(missing)} images: {shown}")
    extra = sorted(masks.keys() - set(stems.values()))
    if extra:
        logger.warning("%s: %d masks belong to no image (such as %s)", folder, len(extra), masks[extra[0]].name)
    return [replace(sample, mask=masks[stems[sample.path]]) for sample in samples]


def refuse_other_sizes(samples: Iterable[Sample], sizes: dict[Path, Size]) -> None:
    """Raises UserError if a mask and its image, both upright, differ in size: the pixels would not correspond."""
    wrong = []
    for sample in samples:
        if sample.mask is not None and (found := sizes[sample.mask]) != sample.size:
            wrong.append(f"  {sample.mask}: {found[0]} × {found[1]}, its image {sample.size[0]} × {sample.size[1]}")
    if wrong:
        rest = [f"  and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        listed = "\n".join([*wrong[:_SHOWN], *rest])
        raise UserError(f"{len(wrong)} masks differ in size from their image:\n{listed}")
