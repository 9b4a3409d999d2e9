"""The tables of docs/{memory,sd3,flux,flux2,chroma,anima,z-image}.md: what `--fit` sets for cards, what is needed then.

    python -m benchmarks.fit_table            # about two minutes of one core; no weights are needed

Computed on outlines of the models at their true sizes: nothing is measured, and nothing allocated.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.true_outlines import write

CARDS = (6, 8, 12, 16, 24)
MODELS = {
    "sd15": ("SD 1.5", 512),
    "sdxl": ("SDXL", 1024),
    "sd35m-512": ("SD 3.5 medium", 512),
    "sd35m": ("SD 3.5 medium", 1024),
    "sd35l": ("SD 3.5 large", 1024),
    "flux-512": ("FLUX.1 dev", 512),
    "flux": ("FLUX.1 dev", 1024),
    "flux2-512": ("FLUX.2 klein 4B", 512),
    "flux2": ("FLUX.2 klein 4B", 1024),
    "flux2_9b-512": ("FLUX.2 klein 9B", 512),
    "flux2_9b": ("FLUX.2 klein 9B", 1024),
    "chroma-512": ("Chroma", 512),
    "chroma": ("Chroma", 1024),
    "anima-512": ("Anima", 512),
    "anima": ("Anima", 1024),
    "z_image-512": ("Z-Image", 512),
    "z_image": ("Z-Image", 1024),
}
CAPTION = " ".join(["fox"] * 600)  # longer than any model takes: Chroma and Z-Image need more for longer texts
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")


def rows(family: str, folder: Path, more: Sequence[str] = ()) -> Iterator[str]:
    """A line of the table for each card. more: further words of the command line."""
    from PIL import Image

    from library import log
    from library.config.parser import parse
    from library.errors import UserError
    from library.guidance import fit, verdict
    from library.guidance.card import Card
    from library.run.plan import make_plan
    from library.units import human_bytes

    title, side = MODELS[family]
    images = folder / f"{family}-images" / "1_any"
    images.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(images / "0.png")
    (images / "0.txt").write_text(CAPTION, encoding="utf-8")
    words = [
        *("--pretrained_model_name_or_path", str(write(folder / family, family.partition("-")[0]))),
        *("--train_data_dir", str(images.parent), "--output_dir", str(folder / "out"), "--resolution", str(side)),
        *("--caption_extension", ".txt"),
        *("--network_dim", "16", "--learning_rate", "1e-4", "--seed", "1", "--gpu_memory", "24GB"),
        *more,
    ]
    with log.errors_only():
        plan = make_plan(parse(words))
        estimates = verdict.estimator(plan)
        for gigabytes in CARDS:
            card = Card(f"{gigabytes} GB", gigabytes * 2**30, gigabytes * 2**30)
            try:
                choice = fit.choose(plan, card, estimates)
            except UserError as error:
                yield f"| {title}, {side} px | {gigabytes} GB | nothing fits | {error} | |"
                continue
            chosen = f"`{choice.words}`" if choice.levers else "nothing: it fits as it is"
            largest = choice.needs.largest
            yield (
                f"| {title}, {side} px | {gigabytes} GB | {chosen} | {human_bytes(largest.total)}, {largest.name} | "
                f"{choice.time:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--cached_text", action="store_true", help="texts are cached, and text encoders not trained")
    parser.add_argument("--text_encoder_format", help="of the run, in bf16")
    options = parser.parse_args()
    more = CACHED if options.cached_text else ()
    if options.text_encoder_format:
        more += ("--mixed_precision", "bf16", "--text_encoder_format", options.text_encoder_format)
    print("| model | card | `--fit` sets | largest moment | time of a step |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for family in options.only or MODELS:
            for row in rows(family, Path(folder), more):
                print(row, flush=True)


if __name__ == "__main__":
    main()
