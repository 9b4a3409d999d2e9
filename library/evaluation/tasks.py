"""The command `tasks`: trains one task after another, each protected against forgetting the ones before, and measures
what of each is left."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library import log
from library.config import parser
from library.config.command import Command, read, run
from library.config.data import dataset_config
from library.config.data.dataset_config import DatasetSpec
from library.config.data.image_folders import NamedFolder, named_folders, refuse_twins
from library.config.fields import option
from library.config.options import Options
from library.errors import UserError, nearest_path
from library.evaluation import replay
from library.evaluation.after_tasks import BASE, Matrix, measure_matrix
from library.evaluation.sweep import Planned, finished_record, options_of, refuse_other_settings, state_words, train
from library.files.atomic import replacing
from library.run.measured import MeasuredFolder, Use, dataset_like, measured_sets

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Trains the tasks of several config files one after the other. Each goes on from the one before, with the protections
that are asked for; then the losses of every task's file on every folder of held-out images are measured: a matrix of
tasks and times, and how much of each task was forgotten. Options of train_network.py stand behind --, as in

    tasks --tasks cats.toml dogs.toml --images cats=held_out/cats dogs=held_out/dogs --against ewc -- --seed 1

A command that was interrupted continues when it is given again."""

Protection = Literal["replay", "ewc", "distillation", "progressive"]


@dataclass(frozen=True, kw_only=True)
class TasksOptions:
    """The tasks"""

    tasks: tuple[str, ...] = option((), help="config files of train_network.py, in the order of training")
    images: tuple[str, ...] = option(
        (),
        help="NAME=FOLDER: held-out captioned images of each task, by the name of its file without .toml; further "
        "folders are what the tasks are not about",
    )
    against: tuple[Protection, ...] = option(
        (),
        help="replay: images of earlier tasks are trained along; ewc: weights that they need are held; distillation: "
        "predictions of the network before are kept; progressive: each task has its own LoRA, on top of the others",
    )
    replay_share: float = option(
        0.3, minimum=0.01, maximum=0.9, help="the share of all draws that are of earlier tasks"
    )
    overwrite: bool = option(False, help="train everything again, also what is finished or has other settings")


COMMAND = Command(name="tasks", description=DESCRIPTION, groups={"tasks": TasksOptions})


@dataclass(frozen=True)
class Task(Planned):
    """One task's training. `files`: of the networks that act after it, its own last."""

    task: str
    datasets: tuple[DatasetSpec, ...]
    files: tuple[Path, ...]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of a training which failed or was stopped, else 0. Raises UserError."""
    place = argv.index("--") if "--" in argv else len(argv)
    try:
        wanted: TasksOptions = read(COMMAND, argv[:place]).groups["tasks"]
    except UserError as error:
        hint = "\noptions of train_network.py stand behind --" * ("unknown option" in str(error))
        raise UserError(f"{error}{hint}") from None
    names = _names(wanted)
    folders = _folders(wanted, names)
    tasks = list(planned(wanted, names, argv[place + 1 :]))
    if not wanted.overwrite:
        for task in tasks:
            refuse_other_settings(task)
    held_out = [_held_out(one, tasks) for one in folders]
    _refuse_trained(held_out, tasks)
    folder = tasks[0].file.parent
    protections = " and ".join(wanted.against) or "nothing"
    print(f"{len(tasks)} tasks into {folder}: {', '.join(names)}; against forgetting: {protections}")
    for number, task in enumerate(tasks):
        if not wanted.overwrite and finished_record(task) is not None:
            continue
        earlier = [one.datasets for one in tasks[:number]]
        if "replay" in wanted.against and number:
            replay.write(_data_file(task.file), task.datasets, earlier, wanted.replay_share)
        if "ewc" in wanted.against and number:
            replay.write_earlier(_earlier_file(task.file), earlier)
        logger.info("tasks: training %s", task.task)
        if code := train(task, anew=wanted.overwrite):
            print(f"{task.name}: ended with exit code {code}; the same command continues", file=sys.stderr)
            return code
    found = measure_matrix(
        {task.task: task.files for task in tasks},
        {one.name: one.dataset for one in held_out},
        tasks[0].options,
        seed=tasks[0].seed,
    )
    for line in found.table():
        print(line)
    path = folder / "tasks.csv"
    _write_csv(path, found)
    print(f"written: {path}")
    return 0


def _names(wanted: TasksOptions) -> list[str]:
    """The tasks' names: those of their files. Raises UserError for fewer than two, missing files and clashing names."""
    if len(wanted.tasks) < 2:
        raise UserError("--tasks: give the config files of at least two tasks")
    for file in map(Path, wanted.tasks):
        if not file.is_file():
            raise UserError(f"--tasks {file}: no such file{nearest_path(file)}")
    refuse_twins(NamedFolder(Path(file).stem, Path(file), f"--tasks {file}") for file in wanted.tasks)
    if "progressive" in wanted.against and (beside := {"ewc", "distillation"} & {*wanted.against}):
        raise UserError(
            f"--against progressive {min(beside)}: a progressive task has a new LoRA of its own, so there are no "
            "weights of earlier tasks to keep; give one of the two"
        )
    return [Path(file).stem for file in wanted.tasks]


def _folders(wanted: TasksOptions, names: Sequence[str]) -> list[NamedFolder]:
    folders = named_folders(wanted.images, option="images")
    refuse_twins(folders)
    if lacking := [name for name in names if name not in {folder.name for folder in folders}]:
        raise UserError(
            f"--images: no held-out images of {', '.join(lacking)}: give {lacking[0]}=FOLDER, with images that are not "
            "trained"
        )
    if BASE in names:
        raise UserError(f"--tasks {BASE}.toml: the base model has that name in the results: give the file another one")
    return folders


def _held_out(folder: NamedFolder, tasks: Sequence[Task]) -> MeasuredFolder:
    """The folder as the data of its task are read; others have no task's trigger words."""
    own = next((task for task in tasks if task.task == folder.name), None)
    task = tasks[0] if own is None else own
    use: Use = "forgetting" if own is None else "validation"
    dataset = dataset_like(task.datasets[0], folder, task.options, use)
    return MeasuredFolder(folder.name, folder.path, folder.place, dataset, use)


def _refuse_trained(held_out: Sequence[MeasuredFolder], tasks: Sequence[Task]) -> None:
    """`UserError` for images to measure on that a task trains, and for images that cannot be read; before training."""
    from library.data.prepare import prepare
    from library.models.opening import open_family

    model = tasks[0].options.model
    family = open_family(model.pretrained_model_name_or_path, vae=model.vae, options=vars(model))
    with log.errors_only():
        for task in tasks:
            size, skip = family.size_divisor, task.options.data.skip_bad_images
            trained = prepare(task.datasets, multiple_of=size, skip_bad_images=skip, measures=True).contents
            measured_sets(held_out, trained, multiple_of=size, skip_bad_images=skip)


def planned(wanted: TasksOptions, names: Sequence[str], more: Sequence[str]) -> Iterator[Task]:
    """The tasks' trainings. What the user gave stays, but for the places of the files and what the protections set."""
    folder: Path | None = None
    before: list[Task] = []
    for name, file in zip(names, wanted.tasks, strict=True):
        words = ["--config_file", file, *more]
        own = parser.parse(words)
        _check(own, name)
        datasets = dataset_config.load_datasets(own)
        if folder is None:
            kinds = "-".join(sorted(wanted.against)) or "unprotected"
            folder = Path(own.output.output_dir) / f"{own.output.output_name or 'last'}-tasks-{kinds}"
        own_file = folder / f"{len(before) + 1}-{name}.{own.output.save_model_as}"
        protected = [*_protections(wanted, before, own_file)] if before else []
        words += ["--output_dir", str(folder), "--output_name", own_file.stem, "--monitoring=true", *state_words(own)]
        options = options_of([*words, *protected])
        seed = own.training.seed or 0
        words += [] if own.training.seed is not None else ["--seed", "0"]
        files = (*before[-1].files, own_file) if before and "progressive" in wanted.against else (own_file,)
        task = Task(f"task {name}", seed, (*words, *protected), options, name, datasets, files)
        yield task
        before.append(task)


def _check(own: Options, name: str) -> None:
    """`UserError` for settings of which no series of tasks can be made."""
    for option_name, value in (
        ("resume", own.run.resume),
        ("dry_run", own.run.dry_run),
        ("debug_dataset", own.run.debug_dataset),
        ("find_lr", own.guidance.find_lr),
        ("recommend", own.guidance.recommend),
        ("network_weights", own.network.network_weights),
        ("base_weights", own.network.base_weights),
    ):
        if value:
            raise UserError(f"task {name}: --{option_name}: leave it out; tasks sets what each training begins with")


def _protections(wanted: TasksOptions, before: Sequence[Task], own_file: Path) -> Iterator[str]:
    """The words by which a task begins where the one before ended, and keeps what the earlier ones learnt."""
    if "progressive" in wanted.against:
        yield from ("--base_weights", *(str(file) for file in before[-1].files))
    else:
        yield from ("--network_weights", str(before[-1].file), "--dim_from_weights")
    if "ewc" in wanted.against:
        yield from ("--ewc_data", str(_earlier_file(own_file)))
    if "distillation" in wanted.against:
        yield from ("--distillation_weight", "1")
    if "replay" in wanted.against:
        yield from ("--train_data_dir=", "--reg_data_dir=", "--in_json=", "--dataset_config", str(_data_file(own_file)))


def _data_file(network: Path) -> Path:
    return network.with_name(f"{network.stem}-data.toml")


def _earlier_file(network: Path) -> Path:
    return network.with_name(f"{network.stem}-earlier.toml")


def _write_csv(path: Path, found: Matrix) -> None:
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("after_task", "folder", "images", "loss", "base", "percent", "standard_error"))
        for row in found.rows():
            writer.writerow(row)


if __name__ == "__main__":
    sys.exit(run(main))
