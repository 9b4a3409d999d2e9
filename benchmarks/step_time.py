"""A training step at the true SD 1.5 size against the bare loop, in turns in one process.

    python -m benchmarks.step_time [--pairs 20] [--folder output/sd15]

256 px, batch 1, rank 8, AdamW, cached latents: fp32 with the text encoder trained, fp32 with cached text embeddings,
and the latter with frozen weights in bf16. The model has random weights and is made at the first call (4.3 GB).
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
from itertools import cycle
from pathlib import Path

from benchmarks.bare_loop import BareLoop
from benchmarks.common import header, interleaved, row, sd15_folder

SETTINGS = {
    "fp32, text encoder trained": ((), {"text_encoder": True}),
    "fp32, cached text": (("--network_train_unet_only", "--cache_text_encoder_outputs"), {}),
    "bf16 frozen weights, cached text": (
        ("--network_train_unet_only", "--cache_text_encoder_outputs", "--mixed_precision", "bf16"),
        {"bf16": True},
    ),
}


def image_folder(folder: Path, count: int = 8) -> Path:
    """Images of 512 × 512 with captions, in the form of --train_data_dir."""
    from PIL import Image

    images = folder / "1_thing"
    images.mkdir(parents=True, exist_ok=True)
    shipped = sorted((Path(__file__).parent.parent / "quickstart" / "images" / "train").glob("*.png"))
    for path in shipped[:count]:
        Image.open(path).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC).save(images / path.name)
        shutil.copy(path.with_suffix(".txt"), images)
    return folder


def words(model: Path, data: Path, output: Path, resolution: int) -> list[str]:
    """The command line that all benchmarks share."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)),
        *("--caption_extension", ".txt", "--resolution", str(resolution), "--output_dir", str(output)),
        *("--network_dim", "8", "--network_alpha", "4", "--learning_rate", "1e-4", "--cache_latents"),
        *("--seed", "42", "--max_train_steps", "1000", "--no-loss_plot"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("output/sd15"))
    parser.add_argument("--only", choices=SETTINGS, action="append")
    options = parser.parse_args()
    model = sd15_folder(options.folder)

    print(header("ours, s", "bare loop, s"))
    for name in options.only or SETTINGS:
        ours, bare = SETTINGS[name]
        with tempfile.TemporaryDirectory() as temporary:
            data = image_folder(Path(temporary) / "data")
            _compare(name, [*words(model, data, Path(temporary), options.resolution), *ours], bare, model, options)
        gc.collect()


def _compare(name: str, command: list[str], bare: dict[str, bool], model: Path, options: argparse.Namespace) -> None:
    from accelerate.state import AcceleratorState

    from library.config.parser import parse
    from library.run.build import build
    from library.run.plan import make_plan
    from library.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    run = build(make_plan(parse(command)))
    steps = cycle([item for item, _ in zip(loop.step_batches(run), range(8), strict=False)])
    peer = BareLoop(model, resolution=options.resolution, **bare)
    comparison = interleaved(lambda: loop.optimizer_step(run, next(steps)), peer.step, pairs=options.pairs)
    print(row(name, comparison), flush=True)


if __name__ == "__main__":
    main()
