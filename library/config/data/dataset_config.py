"""Which images are trained and how: the file of `--dataset_config`, or the folders of `--train_data_dir`, as specs.

A key may stand in [[datasets.subsets]], [[datasets]] or [general]; the first of these that has it counts, then the
option of the same name, then its default.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.config.data.dataset_keys import (
    NOT_YET_ANYWHERE,
    NOT_YET_DATASET,
    NOT_YET_SUBSET,
    OPTION_NAMES,
    PRESERVATION,
    check_key,
)
from library.config.data.image_folders import find_image_folders
from library.config.fields import UNSET, BadValue
from library.config.options import Options
from library.config.other_files import refuse_other_file
from library.config.toml_file import read_text, read_toml
from library.errors import UserError, did_you_mean, nearest_path
from library.files.json_text import parse_json
from library.paths import on_disk

logger = logging.getLogger(__name__)

Values = dict[str, Any]  # each in the type of its key: see `check_key`


@dataclass(frozen=True, kw_only=True)
class SubsetSpec:
    """One folder of images, or one metadata file. `origin` begins each message about it: the file and place that
    define it. With a `metadata_file`, `image_dir` is where the relative paths in it begin. `prior`: "base", "previous"
    or ""; see `library.losses.preservation`.

    Settings with defaults are those that came later: a state's hash of the data leaves them out at their defaults.
    """

    image_dir: Path
    metadata_file: Path | None = None
    is_reg: bool
    num_repeats: int
    share: float | None = None
    caption_extension: str
    class_tokens: str | None
    shuffle_caption: bool
    caption_separator: str
    keep_tokens: int
    keep_tokens_separator: str
    secondary_separator: str | None
    enable_wildcard: bool
    caption_prefix: str | None
    caption_suffix: str | None
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    token_warmup_min: int
    token_warmup_step: float
    flip_aug: bool
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    alpha_mask: bool = False
    conditioning_data_dir: str | None = None
    prior: str = ""
    prior_region: str = "all"
    prior_weight: float = 1.0
    validation_split: float = 0.0
    validation_seed: int | None = None
    validation_dir: str | None = None
    sentences: tuple[str, ...] = ()  # in place of its captions: library.data.templates
    origin: str

    @property
    def source(self) -> Path:
        """The folder or metadata file that lists the samples; it also names the subset."""
        return self.metadata_file or self.image_dir

    @property
    def learns(self) -> bool:
        """Whether its images are to be learnt; regularisation images and those preserved as a whole are not."""
        return not (self.is_reg or (self.prior and self.prior_region == "all"))

    @property
    def validates(self) -> bool:
        """Whether some of its images, or a folder beside them, are for validation."""
        return self.validation_dir is not None or (self.learns and self.validation_split > 0)


def plain_subset(image_dir: Path, *, origin: str, caption_extension: str = "") -> SubsetSpec:
    """A folder, or a file that stands for one, whose images and captions nothing changes."""
    return SubsetSpec(
        image_dir=image_dir,
        is_reg=False,
        num_repeats=1,
        caption_extension=caption_extension,
        class_tokens=None,
        shuffle_caption=False,
        caption_separator=",",
        keep_tokens=0,
        keep_tokens_separator="",
        secondary_separator=None,
        enable_wildcard=False,
        caption_prefix=None,
        caption_suffix=None,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_min=1,
        token_warmup_step=0.0,
        flip_aug=False,
        origin=origin,
    )


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Folders that are batched together. `resolution` is (width, height) in pixels, as is `skip_image_resolution`:
    images of at most that area are left out. `balance`, `reg_share`: see `shares.py`."""

    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    skip_image_resolution: tuple[int, int] | None = None
    balance: str | None = None
    reg_share: float | None = None
    subsets: tuple[SubsetSpec, ...]


_MASKS = ("alpha_mask", "conditioning_data_dir")
_PRIOR = ("prior", "prior_region", "prior_weight")
_SUBSET_ONLY = ("image_dir", "metadata_file", "is_reg", "share", "validation_dir", *_PRIOR, *_MASKS)
# Keys that a metadata file contains itself, or cannot have.
_FOLDERS_ONLY = ("caption_extension", "class_tokens", "is_reg", "validation_dir")
_NO_KEYS = ("sentences", "origin")
_SUBSET_KEYS = tuple(field.name for field in fields(SubsetSpec) if field.name not in (*_SUBSET_ONLY, *_NO_KEYS))
_DATASET_KEYS = tuple(field.name for field in fields(DatasetSpec) if field.name != "subsets")
_DATASET_LEVEL = (
    *_DATASET_KEYS,
    "resolutions",
    *_SUBSET_KEYS,
    "custom_attributes",
    *NOT_YET_DATASET,
    *NOT_YET_ANYWHERE,
)
LEVELS: dict[str, tuple[str, ...]] = {
    "[general]": _DATASET_LEVEL,
    "[[datasets]]": _DATASET_LEVEL,
    "[[datasets.subsets]]": (
        *(*_SUBSET_ONLY, *_SUBSET_KEYS, "custom_attributes"),
        *(*NOT_YET_SUBSET, *NOT_YET_ANYWHERE),
    ),
}


def is_validated(datasets: Iterable[DatasetSpec]) -> bool:
    """Whether any images are held out for validation, or lie in a subset's validation folder."""
    return any(subset.validates for dataset in datasets for subset in dataset.subsets)


def load_datasets(options: Options) -> tuple[DatasetSpec, ...]:
    """The data sets of a run. Raises UserError, which names every mistake that was found, one a line."""
    datasets = _load(options)
    if (fold := options.validation.validation_fold) is None:
        return datasets
    if not any(_is_divided(subset) for spec in datasets for subset in spec.subsets):
        raise UserError("--validation_fold: there is no folder to hold out a part of: each has a validation_dir")
    return tuple(
        replace(spec, subsets=tuple(_folded(subset, 1 / fold[1]) for subset in spec.subsets)) for spec in datasets
    )


def _folded(subset: SubsetSpec, share: float) -> SubsetSpec:
    """The subset with the share that --validation_fold holds out."""
    if subset.validation_split:
        raise UserError(f"{subset.origin}: validation_split: --validation_fold takes its place, leave it out")
    return replace(subset, validation_split=share) if _is_divided(subset) else subset


def _is_divided(subset: SubsetSpec) -> bool:
    """Whether --validation_fold holds out a part of it."""
    return subset.learns and subset.validation_dir is None


def _load(options: Options) -> tuple[DatasetSpec, ...]:
    data = options.data
    if data.dataset_config is not None:
        _warn_of_others(options, "dataset_config", ("train_data_dir", "reg_data_dir", "in_json"))
        return _DatasetFile(Path(data.dataset_config), options).read()
    if data.train_data_dir is None and data.in_json is None:
        raise UserError("no images to train on: give --train_data_dir or --dataset_config")
    if data.resolution is None and data.resolutions is None:
        raise UserError("--resolution is required, for example --resolution 512")
    if data.in_json is not None:
        _warn_of_others(options, "in_json", ("reg_data_dir",))
        own: Values = {"metadata_file": data.in_json, "image_dir": data.train_data_dir}
        return _datasets([], options, (_subset(own, [], _place(options, "in_json"), options),))
    subsets: list[SubsetSpec] = []
    for name, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        directory, origin = getattr(data, name), _place(options, name)
        for folder in find_image_folders(directory, where=origin) if directory is not None else ():
            own = {"image_dir": folder.path, "is_reg": is_reg}
            own |= {"num_repeats": folder.num_repeats, "class_tokens": folder.class_tokens}
            subsets.append(_subset(own, [], origin, options))
    return _datasets([], options, tuple(subsets))


def datasets_of_file(path: Path, options: Options) -> tuple[DatasetSpec, ...]:
    """The data sets of a file like that of --dataset_config. Raises as `load_datasets` does."""
    return _DatasetFile(path, options).read()


def dataset_of_folder(folder: Path, options: Options, origin: str) -> DatasetSpec:
    """One folder of captioned images, whatever its name, with the options about data. `origin`: begins messages."""
    return _datasets([], options, (_subset({"image_dir": str(folder)}, [], origin, options),))[0]


def _warn_of_others(options: Options, chosen: str, others: tuple[str, ...]) -> None:
    for name in others:
        if getattr(options.data, name) is not None:
            logger.warning("%s: has no effect: the data is given by --%s", _place(options, name), chosen)


def _place(options: Options, name: str) -> str:
    return options.given.get(name, f"--{name}")


def _value(key: str, levels: list[Values], options: Options) -> object:
    """The value of `key` at the first level that has it, else the option's."""
    for level in levels:
        if key in level:
            return level[key]
    name = OPTION_NAMES.get(key, key)
    return getattr(options.validation, name, getattr(options.data, name, None))


def _subset(own: Values, outer: list[Values], origin: str, options: Options) -> SubsetSpec:
    """`own`: the keys of the subset itself, image_dir or metadata_file among them; `outer`: those further out."""
    values: Values = {key: _value(key, [own, *outer], options) for key in (*_SUBSET_KEYS, *_MASKS)}
    attributes = _value("custom_attributes", [own, *outer], options)
    directory: str | None = own.get("image_dir")
    metadata_file = Path(own["metadata_file"]) if "metadata_file" in own else None
    if directory is None:
        assert metadata_file is not None, "a subset has one of them"
        directory = str(metadata_file.parent)
    if values["conditioning_data_dir"] is not None:
        values["conditioning_data_dir"] = str(on_disk(Path(values["conditioning_data_dir"])))
    validation_dir = own.get("validation_dir")
    return SubsetSpec(
        image_dir=on_disk(Path(directory)),
        metadata_file=None if metadata_file is None else on_disk(metadata_file),
        is_reg=own.get("is_reg", False),
        share=own.get("share"),
        validation_dir=None if validation_dir is None else str(on_disk(Path(validation_dir))),
        prior=own.get("prior", "base" if isinstance(attributes, dict) and attributes.get(PRESERVATION) else ""),
        prior_region=own.get("prior_region", "all"),
        prior_weight=own.get("prior_weight", 1.0),
        origin=origin,
        **values,
    )


def _datasets(levels: list[Values], options: Options, subsets: tuple[SubsetSpec, ...]) -> tuple[DatasetSpec, ...]:
    """One data set for each resolution. `subsets`: of each of them."""
    values: Values = {key: _value(key, levels, options) for key in _DATASET_KEYS}
    sizes = _resolutions(levels, options) or (values["resolution"],)
    return tuple(DatasetSpec(**{**values, "resolution": size}, subsets=subsets) for size in sizes)


def _resolutions(levels: list[Values], options: Options) -> tuple[tuple[int, int], ...]:
    """Of the first level that has `resolutions` or `resolution`, else the options'; () where nothing has."""
    for level in (*levels, vars(options.data)):
        if level.get("resolutions") is not None:
            return level["resolutions"]
        if level.get("resolution") is not None:
            return (level["resolution"],)
    return ()


class _DatasetFile:
    """The file of `--dataset_config`, read strictly: all mistakes are collected, then reported at once."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.options = options
        self.problems: list[str] = []

    def read(self) -> tuple[DatasetSpec, ...]:
        content = self._content()
        for key in sorted(content.keys() - {"general", "datasets"}):
            near = did_you_mean(key, ("general", "datasets"))
            self.problems.append(f"{self.path}: {key}: only [general] and [[datasets]] can stand at the top{near}")
        general = self._checked("[general]", content.get("general", {}), f"{self.path}: [general]")
        datasets = [
            dataset
            for number, table in self._tables(content, "datasets", f"{self.path}: [[datasets]]")
            for dataset in self._datasets(table, f"{self.path}: [[datasets]] {number}", general)
        ]
        if self.problems:
            raise UserError("\n".join(self.problems))
        return tuple(datasets)

    def _content(self) -> Values:
        if not os.path.isfile(self.path):
            raise UserError(
                f"{_place(self.options, 'dataset_config')}: no such file: {self.path}{nearest_path(self.path)}"
            )
        if self.path.suffix.lower() == ".toml":
            table = read_toml(self.path)
            refuse_other_file(table, self.path, "dataset_config")
            return table
        if self.path.suffix.lower() != ".json":
            raise UserError(f"{self.path}: a data set is described by a .toml or a .json file")
        content = parse_json(read_text(self.path), str(self.path))
        refuse_other_file(content, self.path, "dataset_config")
        if not isinstance(content, dict):
            raise UserError(f"{self.path}: holds no object with 'general' and 'datasets'")
        return content

    def _tables(self, parent: Values, key: str, place: str) -> list[tuple[int, Values]]:
        """The numbered tables of a list such as [[datasets]]."""
        tables = parent.get(key)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            wrong = "is missing" if tables in (None, []) else "is a list of tables: write two brackets on each side"
            self.problems.append(f"{place}: {wrong}")
            return []
        return list(enumerate(tables, 1))

    def _datasets(self, table: Values, place: str, general: Values) -> tuple[DatasetSpec, ...]:
        own = {key: value for key, value in table.items() if key != "subsets"}
        levels = [self._checked("[[datasets]]", own, place), general]
        subsets: dict[Path, SubsetSpec] = {}  # by their source
        for number, content in self._tables(table, "subsets", f"{place}, [[datasets.subsets]]"):
            subset = self._subset(content, f"{place}, [[datasets.subsets]] {number}", levels)
            if subset is not None and subset.source in subsets:
                kind = "image_dir" if subset.metadata_file is None else "metadata_file"
                logger.warning("%s: has no effect: an earlier one has the same %s", subset.origin, kind)
            elif subset is not None:
                subsets[subset.source] = subset
        if not _resolutions(levels, self.options):
            self.problems.append(f"{place}: no resolution: set it here or in [general], or give --resolution")
        elif not subsets and not self.problems:
            self.problems.append(f"{place}: no subset is left to train on")
        if len({subset.metadata_file is None for subset in subsets.values()}) > 1:
            self.problems.append(
                f"{place}: subsets with image_dir alone and subsets with metadata_file cannot stand together: "
                "give each kind [[datasets]] of its own"
            )
        return _datasets(levels, self.options, tuple(subsets.values()))

    def _subset(self, content: Values, place: str, levels: list[Values]) -> SubsetSpec | None:
        own = self._checked("[[datasets.subsets]]", content, place)
        if "metadata_file" in own:
            for key in (key for key in _FOLDERS_ONLY if key in own):
                self.problems.append(f"{place}: {key}: belongs to a folder of images, not to a metadata_file")
        elif "image_dir" not in own:
            if all(
                content.get(key, "") == "" for key in ("image_dir", "metadata_file")
            ):  # otherwise it has a message of its own
                self.problems.append(f"{place}: image_dir is missing: the folder of the images")
            return None
        self._check_validation(own, place)
        subset = _subset(own, levels, place, self.options)
        self._check_prior(own, subset)
        if subset.num_repeats < 1:
            logger.warning("%s: is left out: it asks for %d repeats", place, subset.num_repeats)
            return None
        return subset

    def _check_validation(self, own: Values, place: str) -> None:
        """A folder of validation images takes the place of a split; regularisation images are not validated."""
        wanted = [key for key in ("validation_dir", "validation_split") if own.get(key)]
        if len(wanted) == 2:
            self.problems.append(f"{place}: validation_dir and validation_split: give one of them")
        elif wanted and own.get("is_reg"):
            self.problems.append(f"{place}: {wanted[0]}: regularisation images are not validated")
        elif "validation_dir" in own:
            own["validation_split"] = 0.0  # whatever an outer table says

    def _check_prior(self, own: Values, subset: SubsetSpec) -> None:
        """A prior is the base's or that of --network_weights; what belongs to it needs one."""
        place = subset.origin
        for key in (key for key in ("prior_region", "prior_weight") if key in own and not subset.prior):
            self.problems.append(f'{place}: {key}: needs prior = "base" or "previous"')
        attributes = own.get("custom_attributes")
        if own.get("prior") == "previous" and isinstance(attributes, dict) and attributes.get(PRESERVATION):
            self.problems.append(f'{place}: prior = "previous" and {PRESERVATION}, which is "base": give one of them')
        elif subset.prior == "previous" and self.options.network.network_weights is None:
            self.problems.append(f'{place}: prior = "previous" is the network of --network_weights, which is missing')
        if subset.prior and subset.prior_region == "outside_mask":
            if subset.is_reg:
                self.problems.append(f"{place}: prior_region: regularisation images have nothing to learn in a mask")
            elif not (subset.alpha_mask or subset.conditioning_data_dir):
                self.problems.append(f"{place}: prior_region: no mask: give alpha_mask or conditioning_data_dir")

    def _checked(self, level: str, content: object, place: str) -> Values:
        """The values of one table, each in its type; keys with an empty value ("") are left out."""
        if not isinstance(content, dict):
            self.problems.append(f"{place}: is a table of keys and values, not a list")
            return {}
        checked: Values = {}
        for key, value in content.items():
            try:
                found = check_key(key, value, level=level, levels=LEVELS, place=place)
            except BadValue as error:
                self.problems.append(f"{place}: {key}: {error}")
                continue
            if found is not UNSET:
                checked[key] = found
        if checked.keys() >= {"resolution", "resolutions"}:
            self.problems.append(f"{place}: resolution and resolutions: give one of them")
        return checked
