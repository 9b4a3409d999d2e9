"""The command `draw`: prompts × LoRA files × multipliers × seeds as one labelled picture."""

from __future__ import annotations

import csv
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Read, read, run
from library.config.fields import option
from library.config.options import ModelOptions
from library.config.samplers import SAMPLERS, read_sampler
from library.errors import UserError, nearest_path
from library.evaluation.candidates import BASE, FILES, Candidate, WordOptions, read_candidates
from library.evaluation.precision import PrecisionOptions
from library.sampling.prompts import (
    SamplePrompt,
    SampleTimes,
    of_line,
    read_prompts,
    warn_of_idle_flags,
    with_samplers_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.evaluation.base_model import BaseModel

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Renders prompts with LoRA files, as training renders its samples: one row for each prompt and seed, one column for each
file and multiplier, the base model alone first. Without a file only the base is rendered."""


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Prompts and columns"""

    prompt: tuple[str, ...] = option(
        (), help='prompts, with flags such as "a fox --w 512 --h 512 --s 30 --l 7.5 --d 1 --n blurry"', free_text=True
    )
    sample_prompts: str | None = option(None, help="a file of prompts: .txt (one a line), .toml or .json")
    multipliers: tuple[float, ...] = option((1.0,), help="a column for each: multiplies the files' own")
    seeds: tuple[int, ...] = option(
        (), minimum=0, help="a row for each; take the place of the prompts' own (--d) (default: those, or from --seed)"
    )
    seed: int = option(0, help="as the run's: for prompts without a seed of their own")
    sample_sampler: str = option("ddim", read=read_sampler, help=f"the sampler: {', '.join(SAMPLERS)}")
    base_column: bool = option(True, help="render a first column without any LoRA")
    clip: str | None = option(
        None, help="a folder with a CLIP model: rates each image, by the cosine of its embedding and the prompt's"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written"""

    output_dir: str = option("output", help="the folder to write to; created if it does not exist")
    output_name: str = option("grid", help="the name of the .png and the .csv")
    singles: bool = option(False, help="write every image into a folder of that name, too, in its full size")
    cell: int = option(384, minimum=64, maximum=2048, help="pixels of the longest side of an image in the picture")
    overwrite: bool = option(False, help="overwrite existing files")


COMMAND = Command(
    name="lora-tools draw",
    description=DESCRIPTION,
    groups={
        "draw": DrawOptions,
        "words": WordOptions,
        "model": ModelOptions,
        "precision": PrecisionOptions,
        "output": OutputOptions,
    },
    words=(replace(FILES, required=False),),
)


@dataclass(frozen=True)
class Row:
    """A prompt with one seed. `number`: the prompt's place, from which its noise follows where it has no seed."""

    prompt: SamplePrompt
    number: int
    seed: int | None

    @property
    def label(self) -> str:
        return self.prompt.prompt if self.seed is None else f"{self.prompt.prompt}\nseed {self.seed}"


@dataclass
class Cell:
    """One rendered image. `score`: CLIP's, if there is one. `file`: of the image alone, if it is written."""

    row: Row
    column: Candidate
    image: Image
    score: float | None = None
    file: Path | None = None


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    options, output = given.groups["draw"], given.groups["output"]
    candidates = read_candidates(given.words)
    columns = [one.times(factor) for one in candidates for factor in options.multipliers]
    columns = [*([BASE] if options.base_column or not columns else []), *columns]
    if len({one.parts for one in columns}) < len(columns):
        raise UserError("--multipliers: two columns are the same: " + ", ".join(one.name for one in columns))
    rows = _rows(options)
    if options.clip is not None and not Path(options.clip, "config.json").is_file():
        raise UserError(f"--clip {options.clip}: no CLIP model's folder{nearest_path(Path(options.clip))}")
    singles = _singles(Path(output.output_dir) / output.output_name, rows, columns) if output.singles else None
    paths = [Path(output.output_dir) / f"{output.output_name}.{end}" for end in ("png", "csv")]
    from library.record import saves  # loads torch

    saves.prepare([*paths, *(singles or {}).values()], overwrite=output.overwrite)

    cells = _rendered(given, rows, columns, singles or {})
    if options.clip is not None:
        _score(cells, Path(options.clip))
    _write(paths, cells, width=len(columns), cell=output.cell)
    more = f", {len(singles)} images in {next(iter(singles.values())).parent}" if singles else ""
    print(f"written: {paths[0]}, {paths[1]}{more}")
    return 0


def _rows(options: DrawOptions) -> list[Row]:
    prompts = [of_line(text, f"--prompt {number}") for number, text in enumerate(options.prompt, 1)]
    if options.sample_prompts is not None:
        prompts += read_prompts(Path(options.sample_prompts))
    if not prompts:
        raise UserError('no prompt is given: --prompt "a fox", or --sample_prompts with a file of them')
    return [
        Row(prompt, number, seed) for number, prompt in enumerate(prompts) for seed in (options.seeds or (prompt.seed,))
    ]


def _singles(folder: Path, rows: Sequence[Row], columns: Sequence[Candidate]) -> dict[tuple[Row, Candidate], Path]:
    """The files of single images: the row's and the column's number first, then their names as far as files allow."""
    named = {}
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            words = f"{column.name} {row.prompt.prompt}" + ("" if row.seed is None else f" {row.seed}")
            text = re.sub(r"[^\w.-]+", "-", words, flags=re.ASCII).strip("-.")[:100]
            named[row, column] = folder / f"{r:02d}-{c:02d}-{text}.png"
    return named


def _rendered(
    given: Read, rows: Sequence[Row], columns: Sequence[Candidate], singles: Mapping[tuple[Row, Candidate], Path]
) -> list[Cell]:
    """The cells, column by column: the base is loaded once, and a column's files are switched on for its images."""
    from library.evaluation.base_model import BaseModel, open_base
    from library.evaluation.trained_words import read_words, warn_of_absent_words
    from library.files.atomic import replacing
    from library.progress import progress
    from library.sampling.render import check_sampler

    options, model, precision = given.groups["draw"], given.groups["model"], given.groups["precision"]
    more = {"zero_terminal_snr": precision.zero_terminal_snr}
    family = open_base(model, columns, given=given.given, more=more, embeddings=True)
    words = read_words(family, columns, token_string=given.groups["words"].token_string)
    sampler = _sampler(rows, family.process.samplers, options.sample_sampler, given="sample_sampler" in given.given)
    told, flow = family.rendering.guidance is not None, family.process.prediction_type == "velocity"
    warn_of_idle_flags((row.prompt for row in rows), told=told, flow=flow)
    for row in rows:
        check_sampler(row.prompt.sample_sampler or sampler)
    warn_of_absent_words(family, words, _texts(rows), what="prompt")
    base = BaseModel.of(family, precision, no_half_vae=model.no_half_vae, words=words)
    encoders = _encoders(base, rows, columns)
    base.load("denoiser", "vae")
    cells = []
    with progress(desc="drawing", total=len(rows) * len(columns), unit="image") as bar:
        for column in columns:
            with base.adapted(column, "denoiser"):
                for row in rows:
                    cell = Cell(row, column, _image(base, encoders[column], row, sampler, options.seed))
                    if (path := singles.get((row, column))) is not None:
                        with replacing(path) as beside:
                            cell.image.save(beside, format="PNG")
                        cell.file = path
                    cells.append(cell)
                    bar.update()
    return cells


def _texts(rows: Sequence[Row]) -> list[str]:
    return [text for row in rows for text in (row.prompt.prompt, row.prompt.negative_prompt)]


def _sampler(rows: Sequence[Row], known: Sequence[str], sampler: str, *, given: bool) -> str:
    """The sampler of prompts without one of their own. `UserError` for one that the model does not have."""
    prompts = tuple(row.prompt for row in rows)
    times = SampleTimes(prompts=prompts, sampler=sampler, at_first=True, every_n_steps=None, every_n_epochs=None)
    return with_samplers_of(times, known, given=given).sampler


def _encoders(
    base: BaseModel, rows: Sequence[Row], columns: Sequence[Candidate]
) -> dict[Candidate, Callable[[str, str], dict[str, Tensor]]]:
    """For each column a function from prompt and negative prompt to the pipeline's arguments. All texts are encoded
    here, and the text encoders released."""
    from library.sampling.render import EncodedPrompts

    texts = _texts(rows)
    names = tuple(base.family.components.text_encoders)
    base.load(*names)
    encoders: dict[Candidate, Callable[[str, str], dict[str, Tensor]]] = {}
    for column in (BASE, *columns):
        if column != BASE and not base.acts_on(column, *names):
            encoders[column] = encoders[BASE]
            continue
        encoders[column] = encoded = EncodedPrompts(base.family, texts)
        with base.adapted(column, *names), base.autocast():
            encoded.keep(base.family.encode_prompts)
    base.release(*names)
    return encoders


def _image(
    base: BaseModel, encode: Callable[[str, str], dict[str, Tensor]], row: Row, sampler: str, seed: int
) -> Image:
    """One image, from the noise that a sample of this prompt has in training."""
    import torch

    from library import rng
    from library.sampling.render import render

    generator = rng.torch_generator(seed, row.number, "sample")
    if row.seed is not None:
        generator = torch.Generator().manual_seed(row.seed)
    pipeline = base.family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return render(
        base.family, pipeline, encode, row.prompt, sampler=sampler, generator=generator, autocast=base.autocast
    )


def _score(cells: Sequence[Cell], folder: Path) -> None:
    from library.evaluation.clip_score import clip_scores

    scores = clip_scores(folder, [cell.image for cell in cells], [cell.row.prompt.prompt for cell in cells])
    for cell, score in zip(cells, scores, strict=True):
        cell.score = score


def _write(paths: Sequence[Path], cells: Sequence[Cell], *, width: int, cell: int) -> None:
    from library.evaluation.grid import Tile, grid
    from library.files.atomic import replacing

    height = len(cells) // width
    by_row = [[cells[column * height + row] for column in range(width)] for row in range(height)]
    tiles = [[Tile(one.image, "" if one.score is None else f"CLIP {one.score:.3f}") for one in line] for line in by_row]
    heads = [one.column.name for one in by_row[0]]
    with replacing(paths[0]) as beside:
        grid(tiles, heads=heads, labels=[line[0].row.label for line in by_row], side=cell).save(beside, format="PNG")
    with replacing(paths[1]) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "seed", "lora", "clip_score", "file"))
        for one in (one for line in by_row for one in line):
            score = "" if one.score is None else f"{one.score:.6f}"
            seed = "" if one.row.seed is None else one.row.seed
            writer.writerow((one.row.prompt.prompt, seed, one.column.name, score, one.file or ""))


if __name__ == "__main__":
    sys.exit(run(main))
