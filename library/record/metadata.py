"""The metadata of saved files: kohya's `ss_*` and `sshs_*` keys and Stability's `modelspec.*`.

Names and forms are those of kohya's sd-scripts 0.10, because A1111, ComfyUI extensions and model sites read them.
All values are strings; "None" stands for None; nested things are JSON.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from library.errors import UserError
from library.files.hashes import model_metadata
from library.files.header import read_metadata
from library.record.dataset_metadata import DatasetFacts, dataset_metadata
from library.record.modelspec import ModelSpec, data_url, spec_metadata

logger = logging.getLogger(__name__)

# Bytes. Readers of safetensors take headers of 100 MB at most; the names of the tensors stand there as well.
MOST_METADATA = 90_000_000
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
class RunMetadata:
    """The metadata of all files of a run; `at` returns that of the file of one moment.

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
    ours: Mapping[str, object] | None = None  # settings that kohya has no keys for
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
    """Whether a file was written by this run, in this process or in an earlier one that it resumes."""
    return _metadata_of(file).get("ss_session_id") == str(session_id)


def step_of(file: Path) -> int | None:
    """The step after which a file was written; None if its metadata does not have it."""
    text = _metadata_of(file).get("ss_steps", "")
    return int(text) if text.isdecimal() else None


def _metadata_of(file: Path) -> dict[str, str]:
    """The file's metadata; empty for a missing file."""
    try:
        return read_metadata(file)
    except OSError:
        return {}


def facts_metadata(facts: RunFacts) -> dict[str, str]:
    """`ss_*` of everything but datasets and base model."""
    return {f"ss_{field.name}": str(getattr(facts, field.name)) for field in fields(facts)}


def check_user_metadata(options: Mapping[str, str | None]) -> None:
    """UserError, before training, for texts of the user's that do not fit into a file's metadata. `options`: these
    texts by the names of their options."""
    given = {name: text for name, text in options.items() if text}
    if "metadata_thumbnail" in given:
        given["metadata_thumbnail"] = data_url(given["metadata_thumbnail"])
    sizes = {name: size_of({name: text}) for name, text in given.items()}
    if sum(sizes.values()) > MOST_METADATA:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"--{largest}: {sizes[largest] / 1e6:.0f} MB of metadata in a file; at most {MOST_METADATA / 1e6:.0f} MB: "
            "give a smaller one"
        )


def size_of(metadata: Mapping[str, str]) -> int:
    """Bytes in the header of a safetensors file: keys and values as JSON, in UTF-8, with a colon or a comma each."""
    return sum(len(json.dumps(text, ensure_ascii=False).encode()) + 1 for item in metadata.items() for text in item)
