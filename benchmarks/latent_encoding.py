"""Latents per second for the caches: in batches with decoding ahead, in memory and on disk, against one by one.

    python -m benchmarks.latent_encoding [--pairs 20] [--folder output/sd15] [--small]

At the true SD 1.5 size 8 images of 256 px, or with --small the 160 images and the model of the quickstart at 64 px.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import count
from pathlib import Path

import torch

from benchmarks.common import header, interleaved, row, sd15_folder
from benchmarks.step_time import image_folder

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    options = parser.parse_args()

    from library.data.caches.disk import Disk, cache_images
    from library.data.caches.memory import encode_images
    from library.data.images import load_pixels
    from library.data.views import View
    from library.models.opening import open_family

    with tempfile.TemporaryDirectory() as temporary:
        if options.small:
            model, size = ROOT / "quickstart" / "base", (64, 64)
            paths = sorted((ROOT / "quickstart" / "images" / "train").glob("*.png"))
        else:
            model, size = sd15_folder(options.folder), (256, 256)
            paths = sorted((image_folder(Path(temporary)) / "1_thing").glob("*.png"))
        family = open_family(str(model))
        family.components.load("vae", torch.float32, "cpu")
        views = [View(path, size, (0, 0), size, False) for path in paths]

        fresh = count()

        def to_memory() -> None:
            encode_images(views, family.encode_images, batch_size=options.batch_size)

        def to_disk() -> None:
            disk = Disk(encoder="any", folder=Path(temporary) / "cache" / str(next(fresh)))
            cache_images(views, family.encode_images, batch_size=options.batch_size, disk=disk)

        def one_by_one() -> None:
            with torch.no_grad():
                for view in views:
                    family.encode_images(load_pixels(view).unsqueeze(0))

        print(header("ours, s", "peer, s"))
        for name, ours, peer in (
            ("memory, one by one", to_memory, one_by_one),
            ("disk, one by one", to_disk, one_by_one),
            ("disk, memory", to_disk, to_memory),
        ):
            comparison = interleaved(ours, peer, pairs=options.pairs, warmup=1)
            speed = len(paths) / sorted(comparison.ours)[options.pairs // 2]
            print(row(f"{name}: {len(paths)} images of {size[0]} px, {speed:.2f} images/s", comparison))


if __name__ == "__main__":
    main()
