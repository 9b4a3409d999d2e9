"""The trackers of a run (TensorBoard, Weights & Biases), with their folder and settings, from the options."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path

from library.config.options import SECRETS, LoggingOptions, Options, option_groups
from library.config.other_files import refuse_other_file
from library.config.toml_file import read_toml
from library.errors import UserError, did_you_mean
from library.record.trackers import TrackerPlan

logger = logging.getLogger(__name__)

# Secret, or without meaning on another machine: kohya keeps these out of logged configurations, too
_PRIVATE = frozenset(
    (
        *SECRETS,
        *("pretrained_model_name_or_path", "vae", "train_data_dir", "reg_data_dir", "dataset_config"),
        *("output_dir", "logging_dir", "log_tracker_config", "console_log_file", "config_file", "network_weights"),
        *("base_weights", "weights", "sample_prompts"),
    )
)


def plan_trackers(options: Options) -> TrackerPlan:
    """Check the options about logs and warn of those that have no effect. Raises UserError. Starts nothing."""
    wanted = options.logging
    names = _names(wanted)
    for option, needs in (
        ("log_prefix", wanted.logging_dir is not None),
        ("log_tracker_name", bool(names)),
        ("log_tracker_config", bool(names)),
        ("log_config", bool(names)),
        ("wandb_run_name", "wandb" in names),
        ("wandb_api_key", "wandb" in names),
    ):
        if getattr(wanted, option) and not needs:
            reason = "--log_with wandb is not given" if option.startswith("wandb") else "nothing is logged"
            logger.warning("--%s has no effect: %s", option, reason)
    if "wandb" in names:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(f"--log_with {wanted.log_with}: the package 'wandb' is not installed: pip install wandb")
        if options.given.get("wandb_api_key", "").startswith("command line"):
            logger.warning("wandb stores a run's command line, including the key: put wandb_api_key into a file")
    folder = wanted.logging_dir
    if folder is not None:
        folder = str(Path(folder) / f"{wanted.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")
    return TrackerPlan(
        names=names,
        project=wanted.log_tracker_name or "network_train",
        logging_dir=wanted.logging_dir,
        folder=folder,
        settings_file=wanted.log_tracker_config,
        settings=_settings(wanted, names) if names else {},
        config=logged_options(options) if wanted.log_config else None,
        wandb_key=wanted.wandb_api_key,
    )


def _names(wanted: LoggingOptions) -> tuple[str, ...]:
    if wanted.log_with is None:
        return ("tensorboard",) if wanted.logging_dir is not None else ()
    return ("tensorboard", "wandb") if wanted.log_with == "all" else (wanted.log_with,)


def _settings(wanted: LoggingOptions, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """One table for each tracker; --wandb_run_name wins over the file's."""
    settings: dict[str, dict[str, object]] = {name: {} for name in names}
    if wanted.log_tracker_config is not None:
        path = Path(wanted.log_tracker_config)
        content = read_toml(path)
        refuse_other_file(content, path, "log_tracker_config")
        for name, table in content.items():
            if name not in ("tensorboard", "wandb") or not isinstance(table, dict):
                near = did_you_mean(name, ("tensorboard", "wandb"))
                raise UserError(f"{path}: {name}: not a table [tensorboard] or [wandb]{near}")
            if name in names:
                settings[name] |= table
            else:
                logger.warning("%s: [%s] has no effect: that tracker is not used", path, name)
    if "wandb" in names and wanted.wandb_run_name:
        settings["wandb"]["name"] = wanted.wandb_run_name
    return settings


def logged_options(options: Options) -> dict[str, bool | int | float | str]:
    """Every option with its value, except keys and paths. Lists are text, because TensorBoard accepts no lists."""
    found: dict[str, bool | int | float | str] = {}
    for group in option_groups():
        for name, value in vars(getattr(options, group)).items():
            if name not in _PRIVATE and value is not None:
                found[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
