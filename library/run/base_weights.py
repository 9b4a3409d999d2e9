"""The files of --base_weights in a run: merged into the base, or kept apart from it.

A base that is distilled to a few steps is trained on top of an adapter that takes the distillation back. Pictures are
rendered without it, as the finished LoRA is used without it. There such files are frozen networks on the base's layers,
which are switched off: the weights of the base never change.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.config import source
from library.config.options import NetworkOptions, Options
from library.errors import UserError
from library.files.index import read_index
from library.run.encode import DTYPES
from networks.merge import BaseWeights

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from networks.network import Network

logger = logging.getLogger(__name__)


def are_apart(wanted: NetworkOptions, family: ModelFamily) -> bool:
    """Whether they act in training alone: as the user says, else where the base is distilled."""
    off = family.distilled if wanted.base_weights_off_for_samples is None else wanted.base_weights_off_for_samples
    return off and bool(wanted.base_weights)


def every(wanted: NetworkOptions) -> BaseWeights:
    """All of them."""
    return BaseWeights(wanted.base_weights, wanted.base_weights_multiplier or ())


def merged(wanted: NetworkOptions, family: ModelFamily) -> BaseWeights:
    """Those that are merged into the base: all or none."""
    return BaseWeights((), ()) if are_apart(wanted, family) else every(wanted)


def check(wanted: NetworkOptions, family: ModelFamily) -> None:
    """`UserError` for files that do not fit the model, whose parts exist as outlines, or cannot be kept apart."""
    files = every(wanted)
    files.check(family.adapter_targets())
    if not are_apart(wanted, family):
        return
    if not source.is_ours(wanted.network_module):
        raise UserError(
            f"--base_weights with --network_module {wanted.network_module}: modules of other packages do not see what "
            "is apart from the base's weights; with --no-base_weights_off_for_samples the files are merged into these"
        )
    files.refuse_others(family.adapter_targets("denoiser"))


def warn(wanted: NetworkOptions, family: ModelFamily) -> None:
    """Warn of a distilled base without such files."""
    if family.distilled and not wanted.base_weights:
        logger.warning(
            "%s is distilled to a few steps: training unlearns them, unless --base_weights names an adapter that was "
            "made for training on it; the base version needs none",
            family.path,
        )


def bytes_apart(options: Options, family: ModelFamily) -> int:
    """What those that are kept apart take in memory, by their headers."""
    if not are_apart(options.network, family):
        return 0
    files = [read_index(Path(file)).entries.values() for file in options.network.base_weights]
    count = sum(entry.count for entries in files for entry in entries)
    return count * DTYPES[options.precision.mixed_precision].itemsize


def attached(options: Options, family: ModelFamily, device: torch.device) -> list[Network]:
    """The networks of those that are kept apart, frozen, on the layers of the loaded denoiser."""
    if not are_apart(options.network, family):
        return []
    found = []
    with torch.random.fork_rng(devices=[]):  # their first values, which the files' replace
        for network in every(options.network).networks(family.adapter_targets("denoiser")):
            network.requires_grad_(False).eval().to(device, DTYPES[options.precision.mixed_precision])
            network.attach(("unet",))
            found.append(network)
    logger.info("--base_weights: apart from the base's weights, in effect in training and off in pictures")
    return found
