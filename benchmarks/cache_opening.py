"""How long a cache on disk takes to open and to read, beside decoding its images, which every start does too.

    python -m benchmarks.cache_opening [--images 10000] [--resolution 64 512] [--repeats 5]

The images are PNGs of noise, the worst case for their size on disk; the encoder is a stand-in of SD 1.5's shapes. All
files are in the system's page cache. Opening hashes every image and checks every entry; "trusted" is
--skip_cache_check, which hashes the images only. Seconds, with CPU seconds in brackets.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COLUMNS = ("images, MB", "cache, MB", "first run, s", "opening, s", "trusted, s", "decoding all, s", "1000 reads, s")


def timed(work: Callable[[], object], repeats: int) -> str:
    """Median of seconds and, in brackets, of CPU seconds, which another program's load changes less."""
    seconds, busy = [], []
    for _ in range(repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return f"{statistics.median(seconds):.2f} ({statistics.median(busy):.2f})"


def measured(folder: Path, *, side: int, count: int, repeats: int) -> list[str]:
    """The columns for `count` images of `side` pixels."""
    import numpy as np
    import torch
    from PIL import Image

    from library.data.caches.disk import Disk, cache_images
    from library.data.check import check_images
    from library.data.views import View

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels[:, [0, 1, 2, 0]], 8)
        return mean, mean.abs()

    def refuse(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("all is on disk")

    generator = np.random.default_rng(0)
    views = []
    for number in range(count):
        path = folder / f"{number:06d}.png"
        noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=1)
        views.append(View(path, (side, side), (0, 0), (side, side), False))
    disk, trusted = Disk(encoder="any"), Disk(encoder="any", trust=True)
    first = timed(lambda: cache_images(views, encode, batch_size=4, disk=disk), 1)
    cache = cache_images(views, refuse, batch_size=4, disk=disk)
    some = random.Random(0).choices(views, k=1000)
    return [
        f"{sum(view.path.stat().st_size for view in views) / 1e6:.0f}",
        f"{sum(path.stat().st_size for path in folder.glob('.lora_cache/*/*')) / 1e6:.0f}",
        first,
        timed(lambda: cache_images(views, refuse, batch_size=4, disk=disk), repeats),
        timed(lambda: cache_images(views, refuse, batch_size=4, disk=trusted), repeats),
        timed(lambda: check_images(view.path for view in views), repeats),
        timed(lambda: [cache.get([view]) for view in some], repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--resolution", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"| {options.images} images of | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for side in options.resolution:
        with tempfile.TemporaryDirectory() as temporary:
            cells = measured(Path(temporary), side=side, count=options.images, repeats=options.repeats)
            print(f"| {side} px | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
