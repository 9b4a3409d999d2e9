"""What is known of a run before anything large is loaded: options, data, model headers. Most mistakes end here."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config import registry
from library.config.dataset_config import DatasetSpec, load_datasets
from library.config.options import Options
from library.data.captions import refuse_text_cache_of_changing_captions
from library.errors import UserError, nearest_path
from library.models import open_family
from library.training.state import State
from library.training.state import find as find_state

if TYPE_CHECKING:
    from library.data.prepare import Prepared
    from library.models.family import ModelFamily
    from library.optimizers.create import OptimizerChoice

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
    choice: OptimizerChoice
    network_creator: str
    network_arguments: dict[str, Any]
    seed: int
    started_at: float
    session_id: int
    resume: State | None = None


def make_plan(options: Options) -> Plan:
    """Check all that can be checked cheaply, the cheapest first. Raises UserError."""
    datasets = load_datasets(options)
    if options.data.cache_text_encoder_outputs:
        refuse_text_cache_of_changing_captions(datasets)
    creator, arguments = _network_arguments(options)
    weights = options.network.network_weights
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"--network_weights {weights}: no such file{nearest_path(Path(weights))}")
    resume = None
    if options.run.resume is not None:
        output = options.output
        resume = find_state(options.run.resume, output_dir=Path(output.output_dir), output_name=output.output_name)
    seed = options.training.seed
    if seed is None and resume is not None:
        seed = resume.facts.seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
        logger.info("no --seed given: using %d; the same seed gives the same LoRA again", seed)

    # torch loads from here on
    from library.data.prepare import prepare
    from library.optimizers.create import choose_optimizer

    choice = choose_optimizer(
        options.optimizer.optimizer_name,
        options.optimizer.optimizer_args,
        custom_adamw=options.custom_adamw.given(),
    )
    family = open_family(
        options.model.pretrained_model_name_or_path,
        v2=options.model.v2,
        v_parameterization=options.model.v_parameterization,
        vae=options.model.vae,
        clip_skip=options.model.clip_skip,
        max_token_length=options.model.max_token_length,
    )
    prepared = prepare(datasets, multiple_of=family.vae_factor, skip_bad_images=options.data.skip_bad_images)
    started_at = time.time() if resume is None else resume.facts.started_at
    session_id = int(started_at * 1000) % 2**32 if resume is None else resume.facts.session_id
    return Plan(options, datasets, prepared, family, choice, creator, arguments, seed, started_at, session_id, resume)


def _network_arguments(options: Options) -> tuple[str, dict[str, Any]]:
    """The function of the network module that makes the network, and --network_args as its arguments."""
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
    return creator, arguments
