"""The masks of images: files of the same names in a folder beside them. `caches/masks.py` reads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.images import image_extensions
from library.data.samples import Sample, Size
from library.errors import UserError, nearest_path, told_apart
from library.paths import composed

logger = logging.getLogger(__name__)
_SHOWN = 5


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
