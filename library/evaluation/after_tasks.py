"""What is left of each task after the later ones: the losses of every task's network on every folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.data.dataset_config import DatasetSpec
from library.config.options import Options
from library.evaluation.differences import Difference, difference
from library.evaluation.precision import PrecisionOptions

BASE = "base"

ByImage = Sequence[float]
"""The loss of each image of a folder, the mean over the noise levels."""


@dataclass(frozen=True)
class Matrix:
    """`losses[time, folder]`: after the training of the task `time`, or of the base alone. `tasks` in their order;
    `folders` are theirs and others."""

    tasks: Sequence[str]
    folders: Sequence[str]
    losses: Mapping[tuple[str, str], ByImage]

    def beside_base(self, time: str, folder: str) -> Difference:
        return difference(self.losses[time, folder], self.losses[BASE, folder])

    def forgotten(self, folder: str) -> Difference:
        """What a task's folder has lost since the task was trained, in % of its loss then; of another folder, which no
        task is about, in % of the base's."""
        since = folder if folder in self.tasks else BASE
        return difference(self.losses[self.tasks[-1], folder], self.losses[since, folder])

    def rows(self) -> Iterator[tuple[str, str, int, str, str, str, str]]:
        """(after the task, folder, images, loss, the base's, difference in %, its standard error)."""
        for time in self.tasks:
            for folder in self.folders:
                one = self.beside_base(time, folder)
                numbers = [f"{number:.7g}" for number in (one.loss, one.base, one.percent, one.error)]
                yield time, folder, len(self.losses[time, folder]), numbers[0], numbers[1], numbers[2], numbers[3]

    def table(self) -> Iterator[str]:
        """The matrix, and a line for what was forgotten of each folder."""
        yield "difference to the base's loss in %, ± its standard error; negative is better"
        cells = [["after the task", *self.folders]]
        cells += [[time, *(f"{self.beside_base(time, folder)} %" for folder in self.folders)] for time in self.tasks]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield "\nforgotten, in %: the rise of the loss since the task was trained; of other folders, over the base's"
        for folder in self.folders:
            if folder != self.tasks[-1]:
                yield f"{folder}: {self.forgotten(folder)} %"


def measure_matrix(
    files: Mapping[str, Sequence[Path]], folders: Mapping[str, DatasetSpec], options: Options, *, seed: int
) -> Matrix:
    """`files`: those that act together after each task, by its name. `folders`: held-out images by their names.
    `options`: of the base model, its precision and the images. `seed`: of the noise."""
    from library.data.prepare import prepare_to_measure
    from library.diffusion.process import middles
    from library.evaluation.base_model import BaseModel, open_base
    from library.evaluation.candidates import read_candidates
    from library.evaluation.losses import measure

    candidates = read_candidates(["+".join(map(str, together)) for together in files.values()])
    more = {"zero_terminal_snr": options.objective.zero_terminal_snr}
    family = open_base(options.model, candidates, given=options.given, more=more)
    skip = options.data.skip_bad_images
    prepared = {
        name: prepare_to_measure(dataset, multiple_of=family.size_divisor, skip_bad_images=skip)
        for name, dataset in folders.items()
    }
    precision = PrecisionOptions(
        mixed_precision=options.precision.mixed_precision,
        allow_tf32=options.precision.allow_tf32,
        zero_terminal_snr=options.objective.zero_terminal_snr,
    )
    base = BaseModel.of(family, precision, no_half_vae=options.model.no_half_vae)
    found = measure(
        base,
        prepared,
        candidates,
        timesteps=middles(0, family.process.steps),
        seed=seed,
        draws=1,
        vae_batch_size=options.data.vae_batch_size,
    )
    times = dict(zip(candidates, files, strict=True))
    losses = {(times.get(one.candidate, BASE), one.folder): one.by_image.mean(dim=1).tolist() for one in found}
    return Matrix(list(files), list(folders), losses)
