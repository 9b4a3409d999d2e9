"""What is known of a run before torch is loaded: options, data, model headers. Most mistakes end here."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.config import registry
from library.config.dataset_config import DatasetSpec, load_datasets
from library.config.options import Options
from library.data.captions import refuse_text_cache_of_changing_captions
from library.data.prepare import Prepared, prepare
from library.models import open_family

if TYPE_CHECKING:
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

# What the trainer gives to a network module's creator itself: no words of the user's.
_GIVEN = (
    *("multiplier", "network_dim", "network_alpha", "file", "vae", "text_encoder", "unet"),
    *("neuron_dropout", "weights_sd", "for_inference", "targets", "seed"),
)


@dataclass(frozen=True)
class Plan:
    """Options that fit together, data that can be read, a model that is there."""

    options: Options
    datasets: tuple[DatasetSpec, ...]
    prepared: Prepared
    family: ModelFamily
    network_creator: str
    network_arguments: dict[str, Any]
    seed: int
    started_at: float

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together."""
        return sum(-(-group.draws // group.batch_size) for group in self.prepared.groups)


def make_plan(options: Options) -> Plan:
    """Check all that can be checked cheaply: data, arguments, the headers of the model's files. Raises UserError."""
    datasets = load_datasets(options)
    if options.data.cache_text_encoder_outputs:
        refuse_text_cache_of_changing_captions(datasets)
    creator = "create_network_from_weights" if options.network.dim_from_weights else "create_network"
    path = f"{options.network.network_module}.{creator}"
    arguments, unchecked = registry.bind(
        path,
        options.network.network_args,
        reserved=_GIVEN,
        where="--network_args",
        named_by="--network_module",
        as_text=True,
    )
    if unchecked:
        logger.warning("--network_args: %s takes any name, so these are not checked: %s", path, ", ".join(unchecked))
    family = open_family(
        options.model.pretrained_model_name_or_path,
        v2=options.model.v2,
        v_parameterization=options.model.v_parameterization,
        vae=options.model.vae,
        clip_skip=options.model.clip_skip,
        max_token_length=options.model.max_token_length,
    )
    prepared = prepare(datasets, multiple_of=family.vae_factor, skip_bad_images=options.data.skip_bad_images)
    seed = options.training.seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
        logger.info("no --seed given: using %d; the same seed gives the same LoRA again", seed)
    return Plan(options, datasets, prepared, family, creator, arguments, seed, time.time())
