"""Aspect-ratio buckets: their sizes, which are kohya's, and the bucket of each image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.data.samples import Size
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec


@dataclass(frozen=True)
class Placement:
    """An image is resized to `resized`, which covers `bucket`, and cut to `bucket`."""

    bucket: Size
    resized: Size

    @property
    def crop(self) -> tuple[int, int]:
        """(left, top) of the cut about the centre."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2


class Buckets:
    """The buckets of a data set. Every width and height is a multiple of `multiple_of` pixels."""

    def __init__(self, spec: DatasetSpec, *, multiple_of: int) -> None:
        """Raises UserError for impossible options."""
        if problems := list(dict.fromkeys(_problems(spec, multiple_of))):  # width and height can share one
            origin = f" (data set of {spec.subsets[0].origin})" if spec.subsets else ""
            raise UserError("\n".join(problem + origin for problem in problems))
        self.spec = spec
        self.free = spec.enable_bucket and spec.bucket_no_upscale
        self.sizes = [] if self.free else _fixed_sizes(spec)

    def place(self, size: Size, *, keep_size: bool = False) -> Placement:
        """Raises ValueError where a bucket without enlargement would be empty.

        `keep_size`: without buckets an image that is large enough is not resized, only cropped, as with kohya's
        --random_crop: the network sees a piece of the image at its full size.
        """
        width, height = self.spec.resolution
        if keep_size and not self.spec.enable_bucket and size[0] >= width and size[1] >= height:
            return Placement(self.spec.resolution, size)
        return _place_without_enlarging(size, self.spec) if self.free else _place(size, self.sizes)


def bucket_sizes(max_area: int, smallest: int, largest: int, step: int) -> list[Size]:
    """All sizes in multiples of `step` whose area is at most `max_area` and whose sides are in smallest … largest.

    For each width the tallest height, both ways round, and the largest square; sorted.
    """
    square = math.isqrt(max_area) // step * step
    sizes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, max_area // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def _problems(spec: DatasetSpec, multiple_of: int) -> Iterator[str]:
    """The mistakes in the options, each with its name, its value and right ones."""
    sides = {"bucket_reso_steps": [spec.bucket_reso_steps]} if spec.enable_bucket else {"resolution": spec.resolution}
    for option, values in sides.items():
        for value in values:
            if value <= 0 or value % multiple_of:
                lower = max(multiple_of, value // multiple_of * multiple_of)
                near = f"{lower} or {lower + multiple_of}"
                yield f"{option} {value}: must be a multiple of {multiple_of}, such as {near}"
    if not spec.enable_bucket or spec.bucket_no_upscale or spec.bucket_reso_steps <= 0:
        return  # the bounds are not used, as in kohya
    width, height = spec.resolution
    smallest, largest = _bounds(spec)
    if smallest == 0:
        yield f"min_bucket_reso {spec.min_bucket_reso}: at least {spec.bucket_reso_steps}, which is bucket_reso_steps"
    if min(width, height) < smallest:
        yield f"min_bucket_reso {spec.min_bucket_reso}: at most {min(width, height)} for resolution {width},{height}"
    if max(width, height) > largest:
        yield f"max_bucket_reso {spec.max_bucket_reso}: at least {max(width, height)} for resolution {width},{height}"


def _bounds(spec: DatasetSpec) -> tuple[int, int]:
    """Smallest and largest side, widened to multiples of the step."""
    step = spec.bucket_reso_steps
    return spec.min_bucket_reso // step * step, -(-spec.max_bucket_reso // step) * step


def _fixed_sizes(spec: DatasetSpec) -> list[Size]:
    if not spec.enable_bucket:
        return [spec.resolution]
    smallest, largest = _bounds(spec)
    return bucket_sizes(spec.resolution[0] * spec.resolution[1], smallest, largest, spec.bucket_reso_steps)


def _place(size: Size, sizes: Sequence[Size]) -> Placement:
    """Into the bucket of the nearest aspect ratio, smaller or larger than the image."""
    width, height = size
    aspect = width / height
    bucket = min(sizes, key=lambda candidate: abs(candidate[0] / candidate[1] - aspect))
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return Placement(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))


def _place_without_enlarging(size: Size, spec: DatasetSpec) -> Placement:
    """Shrunk to the area of the resolution if it is larger, then cut down to multiples of the step."""
    width, height = size
    step, max_area = spec.bucket_reso_steps, spec.resolution[0] * spec.resolution[1]
    resized = size if width * height <= max_area else _shrink(width / height, max_area, step)
    bucket = resized[0] - resized[0] % step, resized[1] - resized[1] % step
    if min(bucket) < step:
        raise ValueError(f"{width} x {height} px gives a side of less than {step} px")
    return Placement(bucket, resized)


def _shrink(aspect: float, max_area: int, step: int) -> Size:
    """One side becomes a multiple of the step: the one that leads to the bucket of the nearer aspect ratio."""
    ideal_width = math.sqrt(max_area * aspect)
    width = _floor_to(ideal_width, step)
    height = _floor_to(max_area / ideal_width, step)
    if min(width, height) < step:
        return width, height
    by_width = abs(width / max(1, _floor_to(width / aspect, step)) - aspect)
    by_height = abs(_floor_to(height * aspect, step) / height - aspect)
    if by_width < by_height:
        return width, int(width / aspect + 0.5)
    return int(height * aspect + 0.5), height


def _floor_to(value: float, step: int) -> int:
    return int(value + 0.5) // step * step
