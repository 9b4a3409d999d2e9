"""The part of a saved file's metadata that is about the data: kohya's `ss_datasets`, `ss_tag_frequency` …"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from library.data.tags import stripped


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
    skip_image_resolution: tuple[int, int] | None = None  # written only if it is set; sd-scripts 0.11 always writes it


def tag_frequency(subsets: Sequence[SubsetFacts], *, most: int | None = None) -> dict[str, dict[str, int]]:
    """The number of captions with each tag, by folder name. Tags lie between separators; case is ignored.

    `most`: keep this many of each folder, the most frequent ones.
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
