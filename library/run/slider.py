"""A slider's prompts as the data sets of a run: read and checked before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.data.dataset_config import DatasetSpec, plain_subset
from library.config.data.slider_prompts import Setting, check_sizes, read_settings
from library.errors import UserError, nearest_path

if TYPE_CHECKING:
    from library.config.options import Options
    from library.data.prepared import Prepared
    from library.models.family import ModelFamily

MOST_IN_METADATA = 16  # settings in ss_leco_preview, as in kohya's files
MOST_PICTURED = 8  # prompts of the picture


def settings_of(options: Options) -> tuple[Setting, ...]:
    """The settings of --prompts_file; () without that option. Raises UserError."""
    if options.slider.prompts_file is None:
        return ()
    path = Path(options.slider.prompts_file)
    if not path.is_file():
        raise UserError(f"--prompts_file {path}: no such file{nearest_path(path)}")
    return read_settings(path)


def datasets_of(settings: Sequence[Setting], options: Options) -> tuple[DatasetSpec, ...]:
    """One data set for each setting, with its size and batch size. The keys about images have their defaults."""
    file = Path(options.slider.prompts_file or "")
    return tuple(
        DatasetSpec(
            resolution=setting.size,
            batch_size=setting.batch_size,
            enable_bucket=False,
            min_bucket_reso=options.data.min_bucket_reso,
            max_bucket_reso=options.data.max_bucket_reso,
            bucket_reso_steps=options.data.bucket_reso_steps,
            bucket_no_upscale=False,
            subsets=(plain_subset(file, origin=setting.place),),
        )
        for setting in settings
    )


def prepared_of(
    settings: Sequence[Setting], datasets: Sequence[DatasetSpec], options: Options, family: ModelFamily
) -> Prepared:
    """The samples of the settings. UserError for sizes or a noise schedule that cannot be."""
    from library.data.sources.prompts import prepared

    check_sizes(settings, multiple_of=family.size_divisor)
    _refuse_pure_noise(family)
    return prepared(settings, datasets, file=Path(options.slider.prompts_file or ""))


def _refuse_pure_noise(family: ModelFamily) -> None:
    """UserError for a model whose predictions at the highest level say nothing about the picture."""
    import torch

    process = family.process
    highest = process.at(torch.tensor([process.steps - 1]))
    if process.prediction_type == "epsilon" and not process.signal_to_noise(highest).item():
        raise UserError(
            f"--prompts_file: {family.path} predicts noise, and its noise schedule ends in pure noise (zero terminal "
            "SNR): from there it cannot denoise"
        )


def pictured(settings: Sequence[Setting]) -> tuple[str, ...]:
    """The prompts of the slider's picture: the different targets, in order."""
    return tuple(dict.fromkeys(setting.target for setting in settings))[:MOST_PICTURED]


def picture_size(settings: Sequence[Setting]) -> tuple[int, int]:
    """The largest of the settings' sizes."""
    return max((setting.size for setting in settings), key=lambda size: size[0] * size[1])


def in_words(settings: Sequence[Setting]) -> list[str]:
    """Each setting as a formula of prompts: "'a face' at 1: '' + 2 · ('a smile' - 'a frown'), 512 × 512 × 1"."""
    return [_in_words(setting) for setting in settings]


def _in_words(setting: Setting) -> str:
    sign = "-" if setting.action == "erase" else "+"
    width, height = setting.size
    size = f"up to {width} × {height}" if setting.dynamic_resolution else f"{width} × {height}"
    weight = f", weight {setting.weight:g}" if setting.weight != 1 else ""
    return (
        f"{setting.target!r} at {setting.multiplier:+g}: {setting.neutral!r} {sign} {setting.guidance_scale:g} · "
        f"({setting.positive!r} - {setting.unconditional!r}); {size}, batch {setting.batch_size}{weight}"
    )


def metadata(settings: Sequence[Setting], options: Options) -> dict[str, object]:
    """kohya's keys of such runs, without "ss_", and ours."""
    if not settings:
        return {}
    names = ("target", "positive", "unconditional", "neutral", "action", "multiplier", "weight")
    preview = [{name: getattr(setting, name) for name in names} for setting in settings[:MOST_IN_METADATA]]
    return {
        "leco_prompt_count": len(settings),
        "leco_prompts_file": Path(options.slider.prompts_file or "").name,
        "leco_preview": json.dumps(preview, ensure_ascii=False),
        "leco_denoise_guidance_scale": options.slider.leco_denoise_guidance_scale,
        "leco_max_denoising_steps": options.slider.max_denoising_steps,
    }
