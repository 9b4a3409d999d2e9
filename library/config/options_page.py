"""Writes docs/options.md from the options as they are declared: `python -m library.config.options_page`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from library.config import kohya
from library.config.fields import Declared, declared
from library.config.options import option_groups

PAGE = Path(__file__).parents[2] / "docs" / "options.md"

_HEAD = """\
# Options

Written by `python -m library.config.options_page` from the options as the program declares them; do not edit.

Every option stands on the command line as `--name value`, or in a TOML file as `name = value`. The command line wins. A
flag needs no value; `--no-name` takes it back. A `0` or an empty value means "not given" wherever that makes sense.

The last column says how an option relates to the one of the same name in kohya's sd-scripts:

- **as kohya**: same name, same meaning, same default.
- **differs**: the same, except for the difference given there.
- **ours**: kohya's scripts do not have it.

Names that are accepted without effect, and those that are refused, follow at the end. An unknown name is an error; the
message names the nearest known one.
"""

# How options of kohya's differ here
DIFFERS: Mapping[str, str] = {
    "base_weights": "files of every kind that is read here are merged, whatever --network_module is; layers that do "
    "not fit are logged",
    "caption_extension": "if nothing is found with it while other captions lie beside the images, the run stops; "
    "with one that no captions have, such as .none, it goes on without them",
    "caption_separator": "used to join shuffled tags and to split counted ones, too, where kohya has a comma",
    "compile": "the ResNet blocks and the transformer blocks of the UNet, with the adapters inside",
    "compile_backend": "three of torch's backends",
    "compile_cache_size_limit": "by default large enough for all blocks",
    "compile_mode": "on a GPU not reduce-overhead and max-autotune, whose CUDA graphs reuse memory that is needed",
    "console_log_level": "other packages' messages appear from warnings on",
    "dynamo_backend": "three of torch's backends",
    "fp8_base": "the same as --base_format fp8; biases, norms, embeddings, the first and the last layers keep their "
    "precision; not with other packages' networks",
    "full_fp16": "refused with an optimizer whose steps in fp16 are zero or NaN",
    "leco_denoise_guidance_scale": "1 needs half the work",
    "log_config": "keys and paths are left out, as in kohya; the other files that options name, too",
    "log_tracker_config": "only [tensorboard] and [wandb]; --wandb_run_name goes before the file's name",
    "max_denoising_steps": "steps of DDIM without gradients, which end at the noise level of the predictions",
    "max_data_loader_n_workers": "an upper bound: no more are started than there is work for",
    "network_args": f"an unknown name is an error; not supported yet: {', '.join(kohya.NETWORK_ARGS_NOT_YET)}",
    "network_module": "networks.lora by default",
    "network_weights": "reads diffusers' and PEFT's names, too; no matching layer, or other shapes, is an error",
    "output_name": "files that exist stop the run, unless --overwrite is given",
    "prompts_file": "an unknown key, and prompts that teach nothing, are errors; each setting comes once in a round",
    "sample_prompts": "read once, at the start; an unknown flag or key is an error; a prompt without a seed has the "
    "same noise each time; the first process renders all; the latents are not clipped",
    "sample_sampler": "an unknown name is an error, where kohya takes ddim",
    "save_last_n_epochs": "counts files, as in kohya",
    "seed": "each image and purpose has random draws of its own, so results differ from kohya's, and do not depend on "
    "the number of workers or processes",
    "vae_batch_size": "1 is fastest on a CPU",
    "max_validation_steps": "counts the batches of all processes together",
    "torch_compile": "the same as --compile: block by block, not the whole UNet",
    "validate_every_n_epochs": "has effect beside --validate_every_n_steps only if it is given",
    "validate_every_n_steps": "also before the first step and after the last",
    "validation_seed": "seeds the noise, too, which is the same for an image each time",
    "validation_split": "copies of an image are on the same side; every image counts once, whatever its repeats",
}


def page() -> str:
    """The whole text."""
    parts = [_HEAD, *(_group(group) for group in option_groups().values())]
    parts.append(_names("Accepted without effect", "One warning says so.", kohya.WITHOUT_EFFECT))
    parts.append(
        _names(
            "Not supported yet",
            "An error before training, unless the value has no effect (kohya's default, `0` or an empty one).",
            kohya.NOT_YET,
        )
    )
    parts.append(_names("Names that only GUIs write", "Kohya's scripts do not read them.", kohya.GUI_EXTRAS))
    parts.append(_other_scripts())
    return "\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _group(group: type) -> str:
    ours = any(mark in (group.__doc__ or "") for mark in ("CustomAdamW", "(ours)"))
    rows = [
        (f"`--{name}`", _default(item), _meaning(item), _status(item, ours=ours))
        for name, item in declared(group).items()
    ]
    title = (group.__doc__ or "").strip()
    return f"## {title}\n\n{_table(('option', 'default', 'meaning', 'against kohya'), rows)}\n"


def _default(item: Declared) -> str:
    if item.required:
        return "required"
    if item.kind is bool and item.default is not None:
        return "on" if item.default else "off"
    return f"`{item.default}`" if item.default not in (None, "", ()) else ""


def _meaning(item: Declared) -> str:
    text = item.details.help.removesuffix(" (ours)")
    choices = [choice for choice in item.choices if choice]
    if choices:
        text += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
    if item.details.aliases:
        text += f"; also {', '.join(f'`--{alias}`' for alias in item.details.aliases)}"
    return text


def _status(item: Declared, *, ours: bool) -> str:
    if ours or item.details.help.endswith("(ours)"):
        return "ours"
    said = f"differs: {DIFFERS[item.name]}" if item.name in DIFFERS else "as kohya"
    if item.details.not_yet:
        said += f"; not supported yet: {', '.join(f'`{value}`' for value in item.details.not_yet)}"
    return said


def _names(title: str, text: str, rows: Mapping[str, kohya.Row]) -> str:
    table = _table(("name", "why, or what to do"), ((f"`{name}`", _reason(row)) for name, row in rows.items()))
    return f"## {title}\n\n{text}\n\n{table}\n"


def _reason(row: kohya.Row) -> str:
    said = [row.why, row.hint]
    if row.only_with:
        said.append(f"matters only together with `{row.only_with}`, and is left out without it")
    if row.needs:
        said.append(f"matters only together with {_listed(row.needs)}")
    if row.instead:
        said.append(f"give {_listed(row.instead)} instead")
    return "; ".join(text for text in said if text)


def _listed(names: Iterable[object]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _other_scripts() -> str:
    scripts: dict[str, list[str]] = {}
    for name, row in kohya.OTHER_SCRIPTS.items():
        scripts.setdefault(row.script, []).append(f"`{name}`")
    rows = [*scripts.items(), ("merging, extracting, resizing, converting", [f"`{x}`" for x in sorted(kohya.TOOLS)])]
    table = _table(("of the scripts for", "names"), ((script, ", ".join(names)) for script, names in rows))
    return f"## Of kohya's other scripts\n\nRefused: this program does not do their work.\n\n{table}\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
