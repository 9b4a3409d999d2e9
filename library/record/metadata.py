"""What a saved file says about itself: kohya's `ss_*` and `sshs_*` keys and Stability's `modelspec.*`.

Names and forms are those of kohya's sd-scripts 0.10, because A1111, ComfyUI extensions and model sites read them.
All values are strings; "None" stands for None; nested things are JSON.
"""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.tags import stripped
from library.errors import UserError, why_not
from library.files.hashes import model_metadata

if TYPE_CHECKING:
    from library.config.options import OutputOptions

logger = logging.getLogger(__name__)

# Bytes. Readers of safetensors take headers of 100 MB at most; the names of the tensors stand there as well.
MOST_METADATA = 90_000_000
_LONGEST_SHOWN = 200  # characters of a value in a message
_TAGS_KEPT = (None, 10_000, 1_000, 100, 0)  # of each folder's table, until all fits; None: all

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Plain facts of a run. Field `x` is written as `ss_x`; the defaults are what kohya writes if a feature is off."""

    session_id: int
    training_started_at: float  # Unix time
    output_name: str | None
    learning_rate: float
    text_encoder_lr: float | Sequence[float] | None
    unet_lr: float | None
    num_train_images: int  # repeats included
    num_validation_images: int = 0
    num_reg_images: int = 0
    num_batches_per_epoch: int
    num_epochs: int
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    max_train_steps: int
    lr_warmup_steps: int | float | str = 0
    lr_scheduler: str
    network_module: str
    network_dim: int | None
    network_alpha: float | None
    network_dropout: float | None = None
    mixed_precision: str | None = None
    full_fp16: bool = False
    v2: bool
    base_model_version: str
    clip_skip: int | None = None
    max_token_length: int | None = None
    cache_latents: bool = False
    seed: int | None
    lowram: bool = False
    noise_offset: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    adaptive_noise_scale: float | None = None
    zero_terminal_snr: bool = False
    training_comment: str | None = None
    sd_scripts_commit_hash: str = "(unknown)"  # what kohya writes outside of its own checkout
    optimizer: str  # "torch.optim.adamw.AdamW(weight_decay=0.1)"
    max_grad_norm: float
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    face_crop_aug_range: tuple[float, float] | None = None
    prior_loss_weight: float = 1.0
    min_snr_gamma: float | None = None
    scale_weight_norms: float | None = None
    ip_noise_gamma: float | None = None
    debiased_estimation: bool = False
    noise_offset_random_strength: bool = False
    ip_noise_gamma_random_strength: bool = False
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_scale: float = 1.0
    huber_c: float = 0.1
    fp8_base: bool = False
    fp8_base_unet: bool = False
    validation_seed: int | None = None
    validation_split: float = 0.0
    max_validation_steps: int | None = None
    validate_every_n_epochs: int | None = None
    validate_every_n_steps: int | None = None
    resize_interpolation: str | None = None


@dataclass(frozen=True, kw_only=True)
class SubsetFacts:
    """One image folder, or one metadata file."""

    image_dir: Path
    metadata_file: Path | None = None
    img_count: int  # images, without repeats
    num_repeats: int
    captions: Sequence[str] = ()  # one per image, as trained before shuffling: for the tag frequencies
    caption_separator: str = ","
    is_reg: bool = False
    class_tokens: str | None = None
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    resize_interpolation: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """One dataset: subsets at one resolution. Image counts include repeats, as do those of the buckets."""

    batch_size: int  # per device
    num_train_images: int
    num_reg_images: int
    resolution: tuple[int, int]  # width, height
    enable_bucket: bool
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    bucket_no_upscale: bool
    subsets: Sequence[SubsetFacts]
    buckets: Sequence[tuple[tuple[int, int], int]] = ()  # (width, height), images
    mean_img_ar_error: float = 0.0  # mean |aspect ratio of image - of bucket|
    resize_interpolation: str | None = None
    skip_image_resolution: tuple[int, int] | None = None  # written where it is set, by sd-scripts 0.11 always


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Stability's `modelspec.*`, version 1.0.1. None is left out."""

    architecture: str  # of the base: "stable-diffusion-v1"; "/lora" is added
    title: str
    resolution: tuple[int, int]
    prediction_type: str  # "epsilon" or "v_prediction"
    implementation: str = "diffusers"  # whose names the tensors have
    implementation_version: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    usage_hint: str | None = None
    thumbnail: str | None = None  # a data URL
    merged_from: str | None = None
    trigger_phrase: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None
    timestep_range: tuple[int, int] | None = None
    encoder_layer: int | None = None  # clip skip


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """All that the files of one run say; `at` is what the file of one moment says.

    The base model is hashed when the first file is saved (once, a few seconds for 4 GB), so that a run that fails
    early or only measures never reads it, and not at all with `no_metadata`.
    """

    facts: RunFacts
    datasets: Sequence[DatasetFacts]
    spec: ModelSpec
    model: str  # as given: a file, a folder or a hub id
    vae: str | None
    total_batch_size: int
    from_dataset_config: bool  # otherwise from --train_data_dir, for which kohya writes other keys
    network_args: Mapping[str, object] | None = None
    timestep_distribution: Mapping[str, object] | None = None  # None: uniform, for which kohya writes no keys
    ours: Mapping[str, object] | None = None  # what kohya has no keys for
    no_metadata: bool = False

    @cached_property
    def _constant(self) -> dict[str, str]:
        metadata = facts_metadata(self.facts)
        if self.network_args:
            metadata["ss_network_args"] = json.dumps(dict(self.network_args))
        if self.no_metadata:
            return {key: metadata[key] for key in MINIMUM_KEYS if key in metadata}
        metadata |= {f"ss_{name}": str(value) for name, value in (self.timestep_distribution or {}).items()}
        metadata |= {f"ss_{name}": str(value) for name, value in (self.ours or {}).items()}
        metadata |= model_metadata("sd_model", self.model) | (model_metadata("vae", self.vae) if self.vae else {})
        room = MOST_METADATA - size_of(metadata) - size_of(spec_metadata(self.spec, now=0))
        return metadata | self._datasets_within(room)

    def _datasets_within(self, room: int) -> dict[str, str]:
        """The keys about data in at most `room` bytes: long captions without commas make tables of a hundred MB."""
        found: dict[str, str] = {}
        for most in _TAGS_KEPT:
            found = dataset_metadata(
                self.datasets,
                from_dataset_config=self.from_dataset_config,
                total_batch_size=self.total_batch_size,
                most_tags=most,
            )
            if size_of(found) <= room:
                break
        if most is not None:
            logger.warning(
                "the tables of tags are too large for the metadata of a file: ss_tag_frequency has %s",
                f"the {most} most frequent tags of each folder" if most else "none of them",
            )
        return found

    def at(self, *, steps: int, epoch: int, now: float | None = None) -> dict[str, str]:
        """For a file saved after `steps` steps in `epoch`, at Unix time `now` (None: the clock's)."""
        now = time.time() if now is None else now
        moment = {"ss_training_finished_at": str(now), "ss_steps": str(steps), "ss_epoch": str(epoch)}
        return self._constant | ({} if self.no_metadata else moment) | spec_metadata(self.spec, now=now)


def belongs_to(file: Path, *, session_id: int) -> bool:
    """Whether a file was written by this run, in this process or in an earlier one that it goes on from."""
    return _said_by(file).get("ss_session_id") == str(session_id)


def step_of(file: Path) -> int | None:
    """After which step a file was written; None if it does not say."""
    text = _said_by(file).get("ss_steps", "")
    return int(text) if text.isdecimal() else None


def _said_by(file: Path) -> dict[str, str]:
    """A safetensors file's metadata; empty for what is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def facts_metadata(facts: RunFacts) -> dict[str, str]:
    """`ss_*` of everything but datasets and base model."""
    return {f"ss_{field.name}": str(getattr(facts, field.name)) for field in fields(facts)}


def spec_metadata(spec: ModelSpec, *, now: float) -> dict[str, str]:
    """`modelspec.*`, dated `now` (Unix time) in local time."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["sai_model_spec"] = "1.0.1"
    values["architecture"] = f"{spec.architecture}/lora"
    values["resolution"] = f"{spec.resolution[0]}x{spec.resolution[1]}"
    values["prediction_type"] = "v" if spec.prediction_type == "v_prediction" else spec.prediction_type
    values["date"] = datetime.fromtimestamp(int(now)).isoformat()
    if spec.timestep_range is not None:
        values["timestep_range"] = f"{spec.timestep_range[0]},{spec.timestep_range[1]}"
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def data_url(thumbnail: str) -> str:
    """A `data:` URL as it is, an image file as one."""
    if thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    if not os.path.isfile(path):
        raise UserError(f"--metadata_thumbnail: {_shortened(thumbnail)} is neither a file nor a data URL")
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail {thumbnail}: cannot be read: {why_not(error)}") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def check_user_metadata(output: OutputOptions) -> None:
    """UserError for what the user wants to stand in the metadata and no file can hold, before anything is trained."""
    if output.save_model_as != "safetensors":
        return
    given = {name: text for name, text in vars(output).items() if name.startswith("metadata_") and text}
    if output.training_comment:
        given["training_comment"] = output.training_comment
    if "metadata_thumbnail" in given:
        given["metadata_thumbnail"] = data_url(given["metadata_thumbnail"])
    sizes = {name: size_of({name: text}) for name, text in given.items()}
    if sum(sizes.values()) > MOST_METADATA:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"--{largest}: {sizes[largest] / 1e6:.0f} MB in the file's metadata, which holds {MOST_METADATA / 1e6:.0f} "
            "MB at most: give a smaller one"
        )


def size_of(metadata: Mapping[str, str]) -> int:
    """Bytes in the header of a safetensors file: keys and values as JSON, in UTF-8, with a colon or a comma each."""
    return sum(len(json.dumps(text, ensure_ascii=False).encode()) + 1 for item in metadata.items() for text in item)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


# -- datasets


def tag_frequency(subsets: Sequence[SubsetFacts], *, most: int | None = None) -> dict[str, dict[str, int]]:
    """How often each tag stands in the captions, by folder name. Tags lie between separators; case is ignored.

    `most`: keep so many of each folder, the most frequent ones.
    """
    folders: dict[str, dict[str, int]] = {}
    for subset in subsets:
        counts = folders.setdefault(_name(subset), {})
        for caption in subset.captions:
            for tag in filter(None, stripped(caption.lower(), subset.caption_separator.lower())):
                counts[tag] = counts.get(tag, 0) + 1
    if most is None:
        return folders
    return {name: dict(Counter(counts).most_common(most)) for name, counts in folders.items()}


def dataset_metadata(
    datasets: Sequence[DatasetFacts], *, from_dataset_config: bool, total_batch_size: int, most_tags: int | None = None
) -> dict[str, str]:
    """The keys about data: `ss_datasets` for a dataset config, single keys for `--train_data_dir`.

    `most_tags`: see `tag_frequency`.
    """
    frequencies: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        frequencies = tag_frequency(dataset.subsets, most=most_tags) | frequencies  # a folder used twice counts once
    train = [subset for dataset in datasets for subset in dataset.subsets if not subset.is_reg]
    common = {"ss_tag_frequency": json.dumps(frequencies), "ss_dataset_dirs": json.dumps(_folders(train))}
    if from_dataset_config:
        return {"ss_datasets": json.dumps([_dataset(dataset, most_tags) for dataset in datasets])} | common
    assert len(datasets) == 1, "--train_data_dir makes one dataset"
    (dataset,) = datasets
    first = dataset.subsets[0]  # all subsets have the same settings here
    single = {
        "batch_size_per_device": dataset.batch_size,
        "total_batch_size": total_batch_size,
        "resolution": tuple(dataset.resolution),
        "color_aug": first.color_aug,
        "flip_aug": first.flip_aug,
        "random_crop": first.random_crop,
        "shuffle_caption": first.shuffle_caption,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "keep_tokens": first.keep_tokens,
        "reg_dataset_dirs": json.dumps(_folders([subset for subset in dataset.subsets if subset.is_reg])),
        "bucket_info": json.dumps(_bucket_info(dataset)),
    }
    if dataset.skip_image_resolution is not None:
        single["skip_image_resolution"] = dataset.skip_image_resolution
    return {f"ss_{key}": str(value) for key, value in single.items()} | common


def _name(subset: SubsetFacts) -> str:
    return (subset.metadata_file or subset.image_dir).name  # never a path: files get published


def _folders(subsets: Sequence[SubsetFacts]) -> dict[str, dict[str, int]]:
    """Repeats and images by folder name; a name seen before gets a number."""
    folders: dict[str, dict[str, int]] = {}
    for subset in subsets:
        name, number = _name(subset), 2
        while name in folders:
            name, number = f"{_name(subset)} ({number})", number + 1
        folders[name] = {"n_repeats": subset.num_repeats, "img_count": subset.img_count}
    return folders


def _bucket_info(dataset: DatasetFacts) -> dict[str, object] | None:
    if not dataset.enable_bucket:
        return None
    filled = [(size, count) for size, count in dataset.buckets if count]
    return {
        "buckets": {i: {"resolution": size, "count": count} for i, (size, count) in enumerate(filled)},
        "mean_img_ar_error": dataset.mean_img_ar_error,
    }


def _dataset(dataset: DatasetFacts, most_tags: int | None) -> dict[str, object]:
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "tag_frequency": tag_frequency(dataset.subsets, most=most_tags),
        "bucket_info": _bucket_info(dataset),
        "resize_interpolation": dataset.resize_interpolation,
        **({} if (skipped := dataset.skip_image_resolution) is None else {"skip_image_resolution": skipped}),
        "subsets": [_subset(subset) for subset in dataset.subsets],
    }


def _subset(subset: SubsetFacts) -> dict[str, object]:
    values = {field.name: getattr(subset, field.name) for field in fields(subset)}
    del values["captions"], values["caption_separator"]  # kohya's has neither
    unused = ("metadata_file",) if subset.metadata_file is None else ("class_tokens", "is_reg")
    values |= {"image_dir": subset.image_dir.name, "metadata_file": _name(subset)}
    return {name: value for name, value in values.items() if name not in unused}
