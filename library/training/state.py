"""The state of a run on disk: everything that a later run needs to continue with the same bits.

A folder `NAME-…-state` contains `state.json` (the run's identity: step, seed, configuration, data) and `state.pt`
(tensors: network, optimizer, loss scale, losses, and each hook's state; see `snapshot`). Images, captions and noise
need no state: they are drawn by keys of (seed, epoch, image), so the step alone determines the next ones. `state.pt` is
read by torch's `weights_only` loader, which executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from library.config.data.dataset_keys import PRESERVATION
from library.config.options import SECRETS, Options, declared_options, option_groups
from library.config.options.precision import PrecisionOptions
from library.errors import UserError, nearest_path, why_not
from library.files import atomic
from library.record.saves import is_state_name

if TYPE_CHECKING:
    from torch import Tensor

    from library.config.data.dataset_config import DatasetSpec, SubsetSpec
    from library.data.prepared import Prepared
    from library.training.run import Run

logger = logging.getLogger(__name__)

FORMAT = 2
READABLE = (1, FORMAT)
FACTS, TENSORS = "state.json", "state.pt"

# Options that a resumed run may change freely: they change no weight, only the places of files and the reports, or, as
# compilation does, the rounding.
_FREE_GROUPS = ("output", "logging", "monitoring", "samples", "run", "divergence", "guidance", "compile")
_FREE = frozenset(
    {
        *("train_data_dir", "reg_data_dir", "dataset_config", "skip_bad_images"),  # the data themselves are compared
        *("max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "text_encoder_batch_size"),
        *("cache_latents", "cache_text_encoder_outputs", "gradient_checkpointing", "network_weights", "deterministic"),
        *("blocks_to_swap", "cpu_offload_checkpointing"),
        *("weights", "save_embedding"),
        *("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "cache_dir", "skip_cache_check"),
        *("validation_split", "validation_seed", "validation_group", "validation_fold"),
        *("validate_every_n_steps", "validate_every_n_epochs", "validation_dir", "validation_gap", "forgetting_dir"),
        *("prompts_file", "slider_picture"),
        "ewc_data",  # what was measured on it is in the state
        *("early_stopping_patience", "early_stopping_threshold", "ema_for"),
    }
)
_UNSAID = frozenset(
    {
        *("resume", "resume_anyway", "overwrite", "config_file", "preset", *SECRETS),
        *("max_train_steps", "max_train_epochs", "seed", "gradient_accumulation_steps"),  # compared by their effect
    }
)
_FORMATS = ("mixed_precision", "base_format", "text_encoder_format", "fp8_base", "fp8_base_unet")
_PLACES = ("image_dir", "validation_dir", "origin")  # of a subset: its place, not its contents


@dataclass(frozen=True)
class Facts:
    """`state.json`. `batches_per_step`: over all processes and accumulation."""

    format: int
    step: int
    total_steps: int
    seed: int
    session_id: int
    started_at: float
    batches_per_step: int
    configuration: dict[str, Any]
    harmless: dict[str, Any]  # options that a resumed run may change
    data: str


@dataclass(frozen=True)
class State:
    """A state that was found and can be read."""

    folder: Path
    facts: Facts


# -- finding one


def find(where: str, *, output_dir: Path, output_name: str | None) -> State:
    """The state of `--resume where`: a folder, or "latest" for this run's newest in `output_dir`. Raises UserError."""
    if where != "latest":
        folder = Path(where)
        atomic.bring_back(folder)
        if not os.path.isdir(folder):
            raise UserError(f"--resume {where}: no such folder{nearest_path(folder)}")
        return _refuse_damaged(State(folder, _read_facts(folder)))
    for folder in atomic.half_replaced(output_dir):
        if is_state_name(folder.name, output_name):
            atomic.bring_back(folder)
    found = []
    for folder in output_dir.iterdir() if os.path.isdir(output_dir) else ():
        if is_state_name(folder.name, output_name):
            with contextlib.suppress(UserError):
                found.append(State(folder, _read_facts(folder)))
    if not found:
        raise UserError(
            f"--resume latest: no state of {output_name or 'a run'} in {output_dir}; --save_state writes them"
        )
    return _refuse_damaged(max(found, key=_age))


def _age(state: State) -> tuple[float, int, float]:
    """Grows from older states to newer ones: a run that --overwrite began anew has fewer steps than the one before."""
    return state.facts.started_at, state.facts.step, state.folder.stat().st_mtime


def _read_facts(folder: Path) -> Facts:
    where = f"--resume {folder}"
    try:
        facts = _facts(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        hint = _states_in(folder)
        if os.path.exists(folder / "train_state.json") or os.path.exists(folder / "optimizer.bin"):
            hint = (
                ": a state of kohya's scripts. Their tensors cannot be read safely; give the LoRA as --network_weights"
            )
        raise UserError(f"{where}: there is no {FACTS} in it{hint}") from None
    except OSError as error:
        raise UserError(f"{where}: {FACTS} cannot be read: {why_not(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: {FACTS} cannot be read: lists in it are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: {FACTS} cannot be read: {error}") from None
    if not os.path.isfile(folder / TENSORS):
        raise UserError(f"{where}: there is no {TENSORS} in it")
    return facts


def _facts(content: object) -> Facts:
    """The facts that were read as JSON, checked. Raises ValueError."""
    if not isinstance(content, dict):
        raise ValueError("it holds no table")
    if content.get("format") not in READABLE:  # nothing else can be checked in another format
        readable = " and ".join(map(str, READABLE))
        raise ValueError(f"its format is {_shown(content.get('format'))}; this program reads {readable}")
    content = {"harmless": {}, **content}  # the first states have none
    kinds = get_type_hints(Facts)
    for name in (*kinds, *content):
        kind = get_origin(kinds.get(name)) or kinds.get(name)
        if type(content.get(name)) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"its '{name}' is {_shown(content.get(name))[:50]}")
    if content["step"] < 0:
        raise ValueError(f"its 'step' is {content['step']}")
    return Facts(**content)


def _states_in(folder: Path) -> str:
    """A hint at the states below a folder that is no state itself."""
    found = sorted(str(path.parent) for path in folder.glob(f"*/{FACTS}"))
    return f"; states are in {', '.join(found[:3])}" if found else ""


def _refuse_damaged(state: State) -> State:
    """Check the table of contents of the tensors' file, before any model is loaded."""
    from library.files.index import read_index

    try:
        read_index(state.folder / TENSORS)
    except UserError as error:
        reason = str(error).removeprefix(f"{state.folder / TENSORS}: ")
        raise UserError(f"--resume {state.folder / TENSORS}: damaged or not a state: {reason}") from None
    return state


# -- is it the same run?


def facts_of(
    options: Options,
    datasets: tuple[DatasetSpec, ...],
    prepared: Prepared,
    *,
    seed: int,
    session_id: int,
    started_at: float,
    total_steps: int,
    batches_per_step: int,
) -> Facts:
    """The facts for the states of this run, before its first step."""
    return Facts(
        format=FORMAT,
        step=0,
        total_steps=total_steps,
        seed=seed,
        session_id=session_id,
        started_at=started_at,
        batches_per_step=batches_per_step,
        configuration=configuration(options),
        harmless=configuration(options, harmless=True),
        data=data_hash(datasets, prepared),
    )


def configuration(options: Options, *, harmless: bool = False) -> dict[str, Any]:
    """Every option that changes weights, or with `harmless` every other one, as JSON values; without keys."""
    values = {
        name: value
        for group in option_groups()
        for name, value in asdict(getattr(options, group)).items()
        if (group in _FREE_GROUPS or name in _FREE) == harmless and name not in _UNSAID
    }
    return json.loads(json.dumps(values, default=str))


def data_hash(datasets: tuple[DatasetSpec, ...], prepared: Prepared) -> str:
    """A hash of the data sets' settings and each image's name, size in pixels and bytes, caption, repeats, bucket."""
    digest = hashlib.sha256()
    for spec in datasets:
        settings = _settings(spec) | {"subsets": [_settings(subset) for subset in spec.subsets]}
        digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for sample, placement in zip(prepared.samples, prepared.placements, strict=True):
        facts = (sample.key, sample.caption, sample.size, sample.repeats, sample.path.stat().st_size, str(placement))
        digest.update(json.dumps(facts).encode())
    if prepared.validation is not None:
        for sample, placement in zip(prepared.validation.samples, prepared.validation.placements, strict=True):
            digest.update(json.dumps((sample.key, sample.caption, str(placement))).encode())
    return digest.hexdigest()


def _settings(spec: DatasetSpec | SubsetSpec) -> dict[str, Any]:
    """The settings that differ from their defaults: so new settings of later versions do not change the hash."""
    found = {
        field.name: value
        for field in fields(spec)
        if (value := getattr(spec, field.name)) != field.default and field.name not in (*_PLACES, "subsets")
    }
    if found.get("prior") == "base":  # as versions wrote it that had no other prior
        found[PRESERVATION] = bool(found.pop("prior"))
    return found


def refuse_other_run(state: State, *, now: Facts, of_length: Sequence[str], anyway: bool) -> frozenset[str]:
    """UserError if options or data of this run differ from the state's; with `anyway` a warning.

    Returns the names of the options that differ, and "seed", "batches per step", "data" and "length" if these do.
    `of_length`: the curves that depend on the run's length.
    """
    before = state.facts
    if before.step >= now.total_steps:
        raise UserError(
            f"--resume {state.folder}: it is of step {before.step} and the run ends at step {now.total_steps}: "
            "nothing is left to train. Raise --max_train_steps or --max_train_epochs"
        )
    # earlier versions had some of the harmless ones among the others
    moved = {name: value for name, value in before.configuration.items() if name in now.harmless}
    if before.harmless and (harmless := _changes(moved | before.harmless, now.harmless)):
        logger.info("--resume: harmless changes since the state:\n  %s", "\n  ".join(harmless.values()))
    weighty = {name: value for name, value in before.configuration.items() if name not in moved}
    changed = _changes(weighty, now.configuration)
    if before.harmless:
        changed = _with_text_format(changed, before, now)
    if before.seed != now.seed:
        changed["seed"] = f"seed: {before.seed} then, {now.seed} now"
    if before.batches_per_step != now.batches_per_step:
        changed["batches per step"] = (
            f"batches per step (processes × gradient_accumulation_steps): {before.batches_per_step} then, "
            f"{now.batches_per_step} now"
        )
    if before.data != now.data:
        changed["data"] = "the data: images, captions or the data set's settings have changed"
    if before.total_steps != now.total_steps:
        line = f"length: {before.total_steps} steps then, {now.total_steps} now"
        if of_length:
            changed["length"] = f"{line}, which changes the curve of the {' and of the '.join(of_length)}"
        else:
            logger.info("--resume: %s", line)
    lines = "\n  ".join(changed.values())
    if changed and not anyway:
        raise UserError(
            f"--resume {state.folder}: the run would not continue as it began:\n  {lines}\n"
            "Undo these changes, or give --resume_anyway"
        )
    if changed:
        logger.warning("--resume_anyway: the run does not continue as it began:\n  %s", lines)
    return frozenset(changed)


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    """A line for each option that differs, by name.

    An option that an earlier version did not have counts as its default; one that was removed counts if it was set.
    """
    declared = declared_options()
    then = {name: json.loads(json.dumps(declared[name].default, default=str)) for name in now} | dict(before)
    return {
        name: f"{name}: {_shown(then[name])} then, {_shown(now.get(name))} now"
        for name in sorted(then)
        if then[name] != now.get(name) and (name in now or then[name])
    }


def _with_text_format(changed: dict[str, str], before: Facts, now: Facts) -> dict[str, str]:
    """The changes with one of the format that the text encoders are held in, which --base_format sets as well, but not
    for a cache of captions: it is one only if the weights that encode are rounded otherwise."""
    formats = [_text_format(facts) for facts in (before, now)]
    if formats[0] == formats[1]:
        return {name: line for name, line in changed.items() if name != "text_encoder_format"}
    then, since = (f"held in {format}" if format else "as they are" for format in formats)
    line = f"text_encoder_format: text encoders {then} then, {since} now (a cache of captions: as named for them alone)"
    return {"text_encoder_format": line, **changed}


def _text_format(facts: Facts) -> str:
    """The format that a run's text encoders are held in while they encode captions; "": as they are."""
    asked = PrecisionOptions(**{name: facts.configuration[name] for name in _FORMATS if name in facts.configuration})
    return asked.encoding_format if facts.harmless.get("cache_text_encoder_outputs") else asked.text_format


def _shown(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


# -- writing and reading


def write(folder: Path, run: Run, facts: Facts, step: int) -> None:
    """Write the state after `step` steps; the folder appears whole or not at all. Raises UserError."""
    import torch

    from library.training import snapshot

    try:
        with atomic.replacing_folder(folder) as beside:
            torch.save(snapshot.tensors_of(run), beside / TENSORS)
            text = json.dumps(asdict(replace(facts, step=step)), indent=1, ensure_ascii=False)
            (beside / FACTS).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # pickle raises all three
        raise UserError(f"{folder}: not written: the optimizer's state cannot be stored: {error}") from error
    logger.info("saved %s", folder)


def network_of(state: State) -> dict[str, Tensor]:
    """The weights of the state's network."""
    network = _tensors(state).get("network")
    if not isinstance(network, dict):
        raise UserError(f"--resume {state.folder / TENSORS}: damaged: it has no network")
    return network


def _tensors(state: State) -> dict[str, Any]:
    """The tensors that `write` has stored. Raises UserError if the file is damaged."""
    import torch

    from library.training import snapshot

    file = state.folder / TENSORS
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {file}: damaged or not a state: {reason}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"--resume {file}: damaged or not a state: it holds no table")
    return snapshot.of_format_1(tensors) if state.facts.format == 1 else tensors


def load(state: State, run: Run, *, changed: Collection[str] = ()) -> None:
    """Load the state into the run. Raises UserError if the file is damaged or of another network or optimizer.

    `changed`: the differences, as `refuse_other_run` returns them; rates and other settings are then this run's.
    """
    from library.training import resumed_settings, snapshot

    file, tensors = state.folder / TENSORS, _tensors(state)
    with resumed_settings.kept(run, tensors, changed=changed, step=state.facts.step) as without:
        snapshot.put(run, tensors, f"--resume {file}", without=without)
    run.position.done = state.facts.step
    logger.info("resumed %s: %d of %d steps are done", state.folder, run.position.done, run.position.total)


def remove(folder: Path) -> None:
    """Delete a state that retention no longer keeps; a folder that is no state stays."""
    if not folder.is_dir() or (folder / FACTS).exists():  # a killed removal may have left a part
        atomic.remove(folder)
