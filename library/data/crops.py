"""Random crops, anew each time an image is seen: anywhere, or around a face. Geometry only."""

from __future__ import annotations

import random
from pathlib import Path

from library.data.samples import Face, Size


def random_crop(resized: Size, size: Size, rng: random.Random) -> tuple[int, int]:
    """(left, top) of a crop of `size`, uniform over the resized image."""
    return rng.randint(0, resized[0] - size[0]), rng.randint(0, resized[1] - size[1])


def face_in_name(path: Path) -> Face | None:
    """The face that a detector has written into a file name, "photo_120_80_64_64.png": its centre, width and height."""
    numbers = path.stem.rsplit("_", 4)[1:]
    if len(numbers) < 4 or not all(number.isdecimal() for number in numbers):
        return None
    return Face(*map(int, numbers))


def is_within(face: Face, size: Size) -> bool:
    """Whether an image of this size can have this face; else the numbers in the name mean something else."""
    return 0 < face.x < size[0] and 0 < face.y < size[1] and 0 < face.width <= size[0] and 0 < face.height <= size[1]


def face_crop(
    face: Face, *, image: Size, size: Size, among: tuple[float, float], anywhere: bool, rng: random.Random
) -> tuple[Size, tuple[int, int]]:
    """(resized, (left, top)) of a crop of `size` around a face, as kohya draws it.

    The shorter side of the crop is the face's longer side times a random factor from the range `among`, limited by the
    image's size; the image is enlarged no more than it takes to fill the crop. The face is in the middle, moved by up
    to a twentieth of its size; with `anywhere` (--random_crop) by up to the image's width and height, larger moves
    being less likely.
    """
    longer, shorter = max(face.width, face.height), min(size)
    covers = max(size[0] / image[0], size[1] / image[1])
    least, most = (min(max(1.0, covers), max(covers, shorter / (longer * times))) for times in reversed(among))
    scale = rng.uniform(least, most)
    # rounding must not leave the image a pixel too small
    resized = max(size[0], int(image[0] * scale + 0.5)), max(size[1], int(image[1] * scale + 0.5))
    wobbles = among[0] != among[1] and longer >= 40 and longer > shorter // 10
    start = []
    for centre, length, side in zip((face.x, face.y), resized, size, strict=True):
        middle = int(centre * scale + 0.5)
        move = 0
        if anywhere:
            reach = max(length - middle, middle)
            move = rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif wobbles:
            move = rng.randint(-(longer // 20), longer // 20)
        start.append(max(0, min(middle - side // 2 + move, length - side)))
    return resized, (start[0], start[1])
