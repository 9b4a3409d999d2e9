"""The command `evaluate`: how well LoRA files fit folders of captioned images, beside the base model alone."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Read, read, run
from library.config.data.dataset_config import DatasetSpec, dataset_of_folder
from library.config.data.image_folders import NamedFolder, named_folders, refuse_twins
from library.config.fields import MAX_SIDE, REQUIRED, option, read_resolution
from library.config.options import DataOptions, ModelOptions, Options
from library.config.options import OutputOptions as TrainOutput
from library.errors import UserError
from library.evaluation.candidates import FILES, Candidate, WordOptions, read_candidates
from library.evaluation.differences import Result, difference, hint, mean, worst
from library.evaluation.precision import PrecisionOptions

if TYPE_CHECKING:
    from library.data.prepared import Prepared
    from library.evaluation.losses import Losses

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Measures the loss of LoRA files on folders of captioned images: mean squared error with the same noise for all, at five
noise levels, as validation does during training, beside the base model alone. Writes a table, a CSV file and a plot."""

# as the trainer names them
BUCKETS = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Images and their noise"""

    images: tuple[str, ...] = option(
        (), help="folders of captioned images that were not trained on; NAME=FOLDER gives one another name"
    )
    train_images: tuple[str, ...] = option((), help="the same for images that the LoRAs were trained on")
    caption_extension: str = option(".txt", help="ending of the caption files")
    resolution: tuple[int, int] = option(
        REQUIRED, read=read_resolution, joined_by=",", help="the size in pixels: 512, or 512,768 (width,height)"
    )
    enable_bucket: bool = option(False, help="measure images of different aspect ratios at different sizes")
    min_bucket_reso: int = option(256, minimum=1, maximum=MAX_SIDE, help="the shortest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, minimum=1, maximum=MAX_SIDE, help="the longest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, minimum=1, maximum=MAX_SIDE, help="sides of buckets are multiples of this")
    bucket_no_upscale: bool = option(False, help="never enlarge an image; its own size decides its bucket")
    batch_size: int = option(1, minimum=1, help="images at once")
    vae_batch_size: int = option(1, minimum=1, help="images that the VAE encodes at once")
    seed: int = option(0, help="the seed of the noise")
    draws: int = option(1, minimum=1, help="average over the noise of this many seeds, for smaller standard errors")
    skip_bad_images: bool = option(False, help="leave unreadable images out instead of stopping")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written"""

    output_dir: str = option("output", help="the folder to write to; created if it does not exist")
    output_name: str = option("evaluation", help="the name of the .csv and the .png")
    overwrite: bool = option(False, help="overwrite existing files")


COMMAND = Command(
    name="lora-tools evaluate",
    description=DESCRIPTION,
    groups={
        "model": ModelOptions,
        "evaluate": EvaluateOptions,
        "words": WordOptions,
        "precision": PrecisionOptions,
        "output": OutputOptions,
    },
    words=(FILES,),
)


@dataclass(frozen=True)
class Folder(NamedFolder):
    """A folder of images, and whether the LoRAs were trained on it."""

    trained: bool


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options, output = given.groups["evaluate"], given.groups["output"]
    candidates = read_candidates(given.words)
    folders = [*_folders(options.train_images, trained=True), *_folders(options.images, trained=False)]
    if not folders:
        raise UserError("no images are given: --images FOLDER, several times for several folders")
    refuse_twins(folders)
    paths = [Path(output.output_dir) / f"{output.output_name}.{end}" for end in ("csv", "png")]
    from library.record import saves  # loads torch

    saves.prepare(paths, overwrite=output.overwrite)

    results, names = _measured(given, candidates, folders)
    for line in table(results):
        print(line)
    for candidate in candidates:
        if said := hint([one for one in results if one.candidate == candidate.name]):
            logger.warning("%s", said)
    _write(paths, results, names)
    print(f"\nwritten: {paths[0]}, {paths[1]}")
    return 0


def _folders(words: Sequence[str], *, trained: bool) -> Iterator[Folder]:
    for one in named_folders(words, option="train_images" if trained else "images"):
        yield Folder(one.name, one.path, one.place, trained)


def dataset_of(folder: Folder, model: ModelOptions, options: EvaluateOptions) -> DatasetSpec:
    """The folder as the trainer has it."""
    data = DataOptions(
        resolution=options.resolution,
        train_batch_size=options.batch_size,
        caption_extension=options.caption_extension,
        **{name: getattr(options, name) for name in BUCKETS},
    )
    options_of_run = Options(model=model, data=data, output=TrainOutput(output_dir=""))
    return dataset_of_folder(folder.path, options_of_run, folder.place)


def _measured(
    given: Read, candidates: Sequence[Candidate], folders: Sequence[Folder]
) -> tuple[list[Result], Sequence[str]]:
    """The results, and the names of the noise ranges."""
    from library.data.prepare import prepare_to_measure
    from library.diffusion.process import BINS, middles
    from library.evaluation.base_model import BaseModel, open_base
    from library.evaluation.losses import measure
    from library.evaluation.trained_words import read_words, warn_of_absent_words

    model, options, precision = given.groups["model"], given.groups["evaluate"], given.groups["precision"]
    more = {"zero_terminal_snr": precision.zero_terminal_snr}
    family = open_base(model, candidates, given=given.given, more=more, embeddings=True)
    words = read_words(family, candidates, token_string=given.groups["words"].token_string)
    prepared = {
        folder.name: prepare_to_measure(
            dataset_of(folder, model, options), multiple_of=family.size_divisor, skip_bad_images=options.skip_bad_images
        )
        for folder in folders
    }
    _warn_of_copies(prepared, folders)
    captions = [sample.caption for one in prepared.values() for sample in one.samples]
    warn_of_absent_words(family, words, captions, what="caption")
    base = BaseModel.of(family, precision, no_half_vae=model.no_half_vae, words=words)
    found = measure(
        base,
        prepared,
        candidates,
        timesteps=middles(0, family.process.steps),
        seed=options.seed,
        draws=options.draws,
        vae_batch_size=options.vae_batch_size,
    )
    return results_of(found, {folder.name: folder.trained for folder in folders}), family.process.bins(BINS)


def _warn_of_copies(prepared: Mapping[str, Prepared], folders: Sequence[Folder]) -> None:
    """Warn of images that were trained on in folders of which the user says that they were not; by their pixels."""
    contents = {name: {sample.key for sample in one.samples} for name, one in prepared.items()}
    for one in (folder for folder in folders if not folder.trained):
        for other in (folder for folder in folders if folder.trained):
            if copies := len(contents[one.name] & contents[other.name]):
                logger.warning(
                    "%d images of %s are in %s as well, which was trained on: its numbers flatter the LoRAs",
                    *(copies, one.name, other.name),
                )


def results_of(found: Sequence[Losses], trained: Mapping[str, bool]) -> list[Result]:
    """The differences of each candidate on each folder; the base's own losses come first in `found`."""
    base = {one.folder: one.by_image for one in found[: len(trained)]}
    return [
        Result(
            candidate=one.candidate.name,
            folder=one.folder,
            trained=trained[one.folder],
            images=len(one.by_image),
            overall=difference(one.by_image.mean(dim=1).tolist(), base[one.folder].mean(dim=1).tolist()),
            by_range=tuple(
                difference(own, of_base)
                for own, of_base in zip(one.by_image.T.tolist(), base[one.folder].T.tolist(), strict=True)
            ),
        )
        for one in found[len(trained) :]
    ]


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table: per candidate the difference to the base on each folder, then the mean and the worst of
    the folders that were not trained on, if there are several."""
    by_candidate: dict[str, list[Result]] = {}
    for one in results:
        by_candidate.setdefault(one.candidate, []).append(one)
    first = next(iter(by_candidate.values()))
    several = len(_judged(first)) > 1
    heads = [f"{one.folder}{' (trained on)' if one.trained else ''}" for one in first]
    rows = [["", *heads, *(["mean", "worst"] if several else [])]]
    rows.append(["images", *(str(one.images) for one in first)])
    rows.append(["loss of the base", *(f"{one.overall.base:.5f}" for one in first)])
    for name, own in by_candidate.items():
        cells, judged = [f"{one.overall} %" for one in own], _judged(own)
        if several:
            cells += [f"{mean([one.overall for one in judged])} %", worst(judged).folder]
        rows.append([name, *cells])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    yield "difference to the base's loss in %, ± its standard error; negative is better"
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _judged(results: Sequence[Result]) -> list[Result]:
    """Those on images that were not trained on; all where there are no such."""
    return [one for one in results if not one.trained] or list(results)


def _write(paths: Sequence[Path], results: Sequence[Result], ranges: Sequence[str]) -> None:
    from library.evaluation.plots import plot_differences
    from library.files.atomic import replacing

    with replacing(paths[0]) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("lora", "folder", "trained_on", "noise", "images", "loss", "base", "percent", "standard_error")
        )
        for one in results:
            for noise, value in zip(("all", *ranges), (one.overall, *one.by_range), strict=True):
                numbers = (value.loss, value.base, value.percent, value.error)
                own = (one.candidate, one.folder, int(one.trained), noise, one.images)
                writer.writerow((*own, *(f"{number:.7g}" for number in numbers)))
    plot_differences(paths[1], results, ranges)


if __name__ == "__main__":
    sys.exit(run(main))
