"""Recognises, by their content, TOML and JSON files that were given to the wrong option."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.config import kohya
from library.config.options import declared_options
from library.errors import UserError

# The content of each kind of file, and the option that it belongs to
_KINDS = {
    "config_file": "options of training",
    "dataset_config": "the description of a data set",
    "sample_prompts": "prompts for samples",
    "log_tracker_config": "settings of trackers",
    "in_json": "a list of images with captions",
    "lycoris_preset": "a preset of LyCORIS",
    "prompts_file": "prompts of a slider",
}
_INSTEAD = {
    "in_json": "give it as --in_json, or as metadata_file in a data set",
    "lycoris_preset": "give it as --network_args preset=FILE",
}
_TRACKERS = {"tensorboard", "wandb"}
_LYCORIS = {
    *("enable_conv", "unet_target_module", "unet_target_name", "text_encoder_target_module", "module_algo_map"),
    *("text_encoder_target_name", "name_algo_map", "use_fnmatch", "exclude_name", "lora_prefix"),
}
_SLIDER = {"slider", "target", "target_class"}
_OF_AN_IMAGE = {"caption", "tags", "train_resolution"}


def refuse_other_file(content: object, path: str | Path, option: str) -> None:
    """UserError if a file's content is plainly for another option than `option`: one message instead of one a line."""
    kind = _kind_of(content)
    if kind and kind != option:
        instead = _INSTEAD.get(kind, f"give it as --{kind}")
        raise UserError(f"--{option} {path}: holds {_KINDS[kind]}, not {_KINDS[option]}: {instead}")


def _kind_of(content: object) -> str:
    """A key of `_KINDS`; "" if the content is of none."""
    if isinstance(content, list):
        prompts = [row for row in content if isinstance(row, dict) and "prompt" in row]
        return "sample_prompts" if prompts and len(prompts) == len(content) else ""
    if not isinstance(content, dict) or not content:
        return ""
    tables = [value for value in content.values() if isinstance(value, dict)]
    prompt, datasets = content.get("prompt"), content.get("datasets")
    if isinstance(datasets, list | dict) or (isinstance(content.get("subsets"), list)):
        return "dataset_config"
    if isinstance(prompt, dict) and "subset" in prompt:
        return "sample_prompts"
    if any(isinstance(content.get(name), list) for name in ("prompts", "targets")) or content.keys() & _SLIDER:
        return "prompts_file"
    if len(tables) == len(content):
        if content.keys() <= _TRACKERS:
            return "log_tracker_config"
        if all(table.keys() & _OF_AN_IMAGE for table in tables):
            return "in_json"
    if len(content.keys() & _LYCORIS) > len(content) / 2:
        return "lycoris_preset"
    return "config_file" if _are_options(content) else ""


def _are_options(content: Mapping[str, object]) -> bool:
    """Whether more than half of the names, in sections or not, are those of options."""
    names = {name for name, value in content.items() if not isinstance(value, dict)}
    names |= {name for value in content.values() if isinstance(value, dict) for name in value}
    known = names & (declared_options().keys() | (kohya.rows().keys() - kohya.TOOLS))
    return "general" not in content and len(known) > len(names) / 2
