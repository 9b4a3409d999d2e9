"""Makes a run's adapter network, by our module or a third party's: attached to the model, with its first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library import rng
from library.config.options import Options
from library.config.registry import Arguments
from library.errors import UserError
from library.run.encode import DTYPES, trains_text
from networks import create, files, foreign, kinds, lycoris
from networks.network import TrainableNetwork
from networks.settings import Asked, LearningRates

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from library.optimizers.create import ParameterGroups
    from networks.files import AdapterFile


def make_network(
    options: Options, family: ModelFamily, *, arguments: Arguments, seed: int, device: torch.device
) -> TrainableNetwork:
    """The network, attached to the loaded parts of the model, in its precision, on its device. Raises UserError.

    `arguments`: --network_args.
    """
    wanted, (start, sizes) = options.network, files_of(options)
    asked = asked_of(options, seed=seed)
    targets = family.adapter_targets()
    # A third party's initial weights come from torch's own stream, whose state differs between processes.
    torch.manual_seed(rng.key_of(seed, "network") >> 1)
    network: TrainableNetwork
    if (kind := kinds.kind_of(wanted.network_module, wanted.network_args)) is None:
        views = foreign.BaseModel(
            family.components.get("vae"), *family.third_party_views(), family.components.get("denoiser")
        )
        network = foreign.create(wanted.network_module, views, targets, asked, arguments, file=sizes)
    else:
        network = create.make(kind, targets, asked, arguments, file=sizes)
        network.naming = options.output.save_naming
    if wanted.scale_weight_norms and (refusal := network.refuses("scale_weight_norms")):
        raise UserError(refusal)
    network.attach(parts_of(options))
    if start is not None:
        network.load(start)
    full = options.precision.full_fp16 or options.precision.full_bf16
    network.to(device, DTYPES[options.precision.mixed_precision] if full else torch.float32)
    network.before_training(gradient_checkpointing=options.precision.gradient_checkpointing)
    return network


def files_of(options: Options) -> tuple[AdapterFile | None, AdapterFile | None]:
    """The file of --network_weights, and the one that the sizes are from: the same with --dim_from_weights."""
    wanted = options.network
    start = None if wanted.network_weights is None else files.read(wanted.network_weights)
    return start, start if wanted.dim_from_weights else None


def asked_of(options: Options, *, seed: int | None = None) -> Asked:
    """The sizes that were asked for. LyCORIS' users give them to every kind, so networks.lycoris is lenient there."""
    wanted = options.network
    return Asked(
        dim=wanted.network_dim,
        alpha=wanted.network_alpha,
        dropout=wanted.network_dropout,
        seed=seed,
        is_lenient=wanted.network_module == lycoris.MODULE,
    )


def parts_of(options: Options) -> list[str]:
    """The parts of the model that are trained."""
    trained = {"text_encoder": trains_text(options), "unet": not options.network.network_train_text_encoder_only}
    return [part for part, is_trained in trained.items() if is_trained]


def parameter_groups(network: TrainableNetwork, options: Options) -> ParameterGroups:
    """The network's parameters in groups, with the rates of the options. Raises UserError."""
    return network.groups(
        LearningRates(
            text_encoder=options.optimizer.text_encoder_lr,
            unet=options.optimizer.unet_lr,
            default=options.optimizer.learning_rate,
            layer_decay=options.optimizer.lr_layer_decay,
        )
    )
