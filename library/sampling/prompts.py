"""Reads the prompts of samples, and the options about when to render them. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.fields import MAX_SIDE, BadValue, read_float, read_int
from library.config.options import SampleOptions
from library.config.other_files import refuse_other_file
from library.config.samplers import read_sampler
from library.config.toml_file import read_text, read_toml
from library.errors import UserError, did_you_mean, nearest_path
from library.files.json_text import parse_json

logger = logging.getLogger(__name__)

_FLAGS = {"w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "n": "negative_prompt"}
_FLAGS |= {"ss": "sample_sampler", "am": "multiplier", "g": "guidance_scale", "fs": "flow_shift"}
# Kohya's flags for other models or for a ControlNet
_UNUSED = {"cn": "controlnet_image", "ctr": "cfg_trunc_ratio", "rcfg": "renorm_cfg"}


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One image to render. The defaults are kohya's; sides are multiples of 8 and at least 64 pixels.

    sample_steps, scale (of classifier-free guidance, 1 is without), guidance_scale (that a distilled model is told):
    None is the model's own, see `library.models.family.Rendering`. flow_shift (of the levels, above 0; 1 is none): None
    is that of the model's process.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    sample_steps: int | None = None
    scale: float | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    seed: int | None = None  # None: from the run's seed and the prompt's place, the same at each time
    sample_sampler: str | None = None  # None: that of --sample_sampler
    multiplier: float = 1.0  # of the network: 0 is the base; a slider's other direction is below it


@dataclass(frozen=True, kw_only=True)
class SampleTimes:
    """The samples to render, and when."""

    prompts: tuple[SamplePrompt, ...]
    sampler: str
    at_first: bool
    every_n_steps: int | None
    every_n_epochs: int | None  # takes precedence over the steps, as in kohya

    def due(self, step: int, *, steps_per_epoch: int) -> str | None:
        """kohya's name in files of the moment after `step` steps, "e000002" or "000100"; None: nothing is rendered."""
        if step == 0:
            return "e000000" if self.at_first else None
        if self.every_n_epochs is not None:
            epoch, rest = divmod(step, steps_per_epoch)
            return f"e{epoch:06d}" if rest == 0 and epoch % self.every_n_epochs == 0 else None
        return f"{step:06d}" if self.every_n_steps is not None and step % self.every_n_steps == 0 else None


def plan_samples(options: SampleOptions) -> SampleTimes | None:
    """Read the prompts. None if no samples are wanted, with a warning if only some of the options were given."""
    times = options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs
    if options.sample_prompts is None or not times:
        if options.sample_prompts is not None:
            logger.warning(
                "--sample_prompts has no effect: it needs --sample_every_n_epochs, --sample_every_n_steps or "
                "--sample_at_first"
            )
        elif times:
            logger.warning("no samples are rendered: --sample_prompts, the file of the prompts, is not given")
        return None
    if options.sample_every_n_epochs and options.sample_every_n_steps:
        logger.warning("--sample_every_n_steps has no effect: --sample_every_n_epochs takes precedence, as in kohya")
    return SampleTimes(
        prompts=read_prompts(Path(options.sample_prompts)),
        sampler=options.sample_sampler,
        at_first=options.sample_at_first,
        every_n_steps=options.sample_every_n_steps,
        every_n_epochs=options.sample_every_n_epochs,
    )


def with_samplers_of(times: SampleTimes, known: Sequence[str], *, given: bool) -> SampleTimes:
    """The same for a model that supports the samplers `known`, the first of which is its default.

    given: whether the user chose --sample_sampler. UserError for a chosen one that is not among them.
    """
    wanted = [("--sample_sampler", times.sampler)] * given
    wanted += [("--sample_prompts: sampler", item.sample_sampler) for item in times.prompts if item.sample_sampler]
    for where, name in wanted:
        if name not in known:
            raise UserError(f"{where} {name}: this model's samplers are {', '.join(known)}{did_you_mean(name, known)}")
    return times if given or times.sampler in known else dataclasses.replace(times, sampler=known[0])


def warn_of_idle_flags(prompts: Iterable[SamplePrompt], *, told: bool, flow: bool) -> None:
    """Log that --g or --fs has no effect. told: whether the model is told a guidance. flow: whether it is trained by
    flow matching."""
    prompts = tuple(prompts)
    if not told and any(item.guidance_scale is not None for item in prompts):
        logger.warning("--sample_prompts: --g has no effect: it is for models that are told a guidance, as FLUX.1 dev")
    if not flow and any(item.flow_shift is not None for item in prompts):
        logger.warning("--sample_prompts: --fs has no effect: it is for models that are trained by flow matching")


def read_prompts(path: Path) -> tuple[SamplePrompt, ...]:
    """The prompts of a .txt, .toml or .json file in kohya's forms. Raises UserError, which names the place."""
    if not os.path.isfile(path):
        raise UserError(f"--sample_prompts {path}: no such file{nearest_path(path)}")
    if path.suffix == ".txt":
        lines = enumerate(read_text(path).splitlines(), 1)
        rows = [(f"{path}, line {n}", line.strip()) for n, line in lines if line.strip() and not line.startswith("#")]
        prompts = [of_line(line, where) for where, line in rows]
    elif path.suffix == ".toml":
        prompts = _of_toml(path)
    elif path.suffix == ".json":
        prompts = _of_json(path)
    else:
        raise UserError(f"--sample_prompts {path}: must end with .txt, .toml or .json")
    if not prompts:
        raise UserError(f"--sample_prompts {path}: contains no prompt")
    return tuple(prompts)


def of_line(line: str, where: str) -> SamplePrompt:
    """The prompt of a line `a cat --n bad --w 512 --h 768 --d 1 --s 20 --l 7`; case does not matter in the flags.
    `where` begins messages."""
    prompt, *flags = re.split(r"\s--(?=\S)", f" {line}")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for text in flags:
        flag, _, value = text.partition(" ")
        flag = flag.lower()
        if flag in _UNUSED:
            logger.warning("%s: --%s has no effect: it is for other models", where, flag)
        elif flag in _FLAGS:
            values[_FLAGS[flag]] = value.strip()
        else:
            raise UserError(f"{where}: unknown flag --{flag}; known: {', '.join(f'--{name}' for name in _FLAGS)}")
    return _of_table(values, where)


def _of_toml(path: Path) -> list[SamplePrompt]:
    """[prompt] with the values that all prompts share, and a [[prompt.subset]] for each."""
    content = read_toml(path)
    refuse_other_file(content, path, "sample_prompts")
    common = content.get("prompt")
    common = common if isinstance(common, dict) else {}
    subsets = common.get("subset")
    if not isinstance(subsets, list) or not all(isinstance(own, dict) for own in subsets):
        raise UserError(f"{path}: has no [[prompt.subset]] below [prompt]")
    shared = {key: value for key, value in common.items() if key != "subset"}
    return [_of_table(shared | own, f"{path}, subset {n}") for n, own in enumerate(subsets, 1)]


def _of_json(path: Path) -> list[SamplePrompt]:
    """A list of tables, or of lines as in .txt."""
    rows = parse_json(read_text(path), str(path))
    refuse_other_file(rows, path, "sample_prompts")
    prompts = [row for row in rows if isinstance(row, dict | str)] if isinstance(rows, list) else []
    if not isinstance(rows, list) or len(prompts) < len(rows):
        raise UserError(f"{path}: is not a list of prompts")
    places = [(f"{path}, prompt {n}", row) for n, row in enumerate(prompts, 1)]
    return [of_line(row, where) if isinstance(row, str) else _of_table(row, where) for where, row in places]


def _of_table(values: dict[str, Any], where: str) -> SamplePrompt:
    readers: dict[str, Callable[[str], Any]] = {
        "seed": _seed,
        "scale": read_float,
        "multiplier": read_float,
        "guidance_scale": read_float,
        "flow_shift": _shift,
        "sample_sampler": read_sampler,
        "prompt": str,
    }
    readers |= {"negative_prompt": str, "width": _side, "height": _side, "sample_steps": _steps}
    assert readers.keys() == {field.name for field in dataclasses.fields(SamplePrompt)}
    read: dict[str, Any] = {"prompt": ""}
    for key, value in values.items():
        if key in _UNUSED.values():
            logger.warning("%s: %s has no effect: it is for other models", where, key)
            continue
        if key not in readers:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(key, readers)}")
        if isinstance(value, bool | list | dict | None):
            raise UserError(f"{where}: {key}: {value!r} is neither text nor a number")
        try:
            read[key] = readers[key](str(value))
        except BadValue as error:
            raise UserError(f"{where}: {key}: {error}") from error
    return SamplePrompt(**read)


def _side(word: str) -> int:
    """Pixels, rounded down to a multiple of 8, as kohya does it."""
    side = read_int(word)
    if not 1 <= side <= MAX_SIDE:
        raise BadValue(f"must be 1 … {MAX_SIDE}, not {word}")
    return max(64, side - side % 8)


def _seed(word: str) -> int:
    seed = read_int(word)
    if not 0 <= seed < 2**64:  # the range of torch's generators
        raise BadValue(f"must be 0 … 2**64 - 1, not {word}")
    return seed


def _shift(word: str) -> float:
    shift = read_float(word)
    if shift <= 0:
        raise BadValue(f"must be above 0, not {word}; 1 shifts nothing")
    return shift


def _steps(word: str) -> int:
    steps = read_int(word)
    if not 1 <= steps <= 1000:
        raise BadValue(f"must be 1 … 1000, not {word}")
    return steps
