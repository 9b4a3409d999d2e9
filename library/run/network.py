"""Makes a run's adapter network, by our module or a third party's: attached to the model, with its first weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library import rng
from library.config.options import Options
from library.config.registry import Arguments
from library.errors import UserError
from library.run.encode import DTYPES
from networks import create, files, foreign, kinds, lycoris
from networks.embeddings.files import read as read_embedding
from networks.embeddings.together import WithEmbedding
from networks.embeddings.vectors import Embedding
from networks.embeddings.vectors import create as create_embedding
from networks.lora import DOWN, UP
from networks.network import Network, TrainableNetwork
from networks.settings import Asked, LearningRates

if TYPE_CHECKING:
    from library.models.checkpoints.adapter_file import WrittenNaming
    from library.models.family import ModelFamily
    from library.optimizers.create import ParameterGroups
    from networks.files import AdapterFile


def make_network(
    options: Options, family: ModelFamily, *, arguments: Arguments, seed: int, device: torch.device
) -> TrainableNetwork:
    """The network, attached to the loaded parts of the model, in its precision, on its device. Raises UserError.

    `arguments`: --network_args.
    """
    embedding = make_embedding(options, family, seed=seed)
    if embedding is not None and options.embedding.train_embedding_only:
        network: TrainableNetwork = embedding
        network.attach(())
    else:
        network = _adapters(options, family, arguments=arguments, seed=seed)
        if embedding is not None:
            embedding.attach()
            network = WithEmbedding(network, embedding, bundle=options.embedding.is_bundled(options.output.save_naming))
    full = options.precision.full_fp16 or options.precision.full_bf16
    network.to(device, DTYPES[options.precision.mixed_precision] if full else torch.float32)
    network.before_training(gradient_checkpointing=options.precision.gradient_checkpointing)
    return network


def make_embedding(options: Options, family: ModelFamily, *, seed: int | None = None) -> Embedding | None:
    """The embedding of --token_string with its first vectors, not attached; None without that option.

    The family has learnt the word already. `UserError` for a file of --weights that does not fit.
    """
    wanted = options.embedding
    if wanted.token_string is None:
        return None
    vectors, tables = wanted.num_vectors_per_token, family.token_tables()
    init = family.token_ids(wanted.init_word) if wanted.init_word and wanted.weights is None else []
    embedding = create_embedding(wanted.token_string, tables, vectors=vectors, init=init, seed=seed)
    if wanted.weights is not None:
        widths = embedding.widths()
        embedding.begin_with(
            read_embedding(
                Path(wanted.weights),
                word=wanted.token_string,
                widths=widths,
                vectors=vectors,
                where=f"--weights {wanted.weights}",
            )
        )
    return embedding


def _adapters(options: Options, family: ModelFamily, *, arguments: Arguments, seed: int) -> TrainableNetwork:
    """The network of adapters, attached, with its first weights."""
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
        network.naming = naming_of(network, family, options)
    if wanted.scale_weight_norms and (refusal := network.refuses("scale_weight_norms")):
        raise UserError(refusal)
    network.attach(parts_of(options))
    if start is not None:
        network.load(start)
    return network


def naming_of(network: Network, family: ModelFamily, options: Options) -> WrittenNaming:
    """--save_naming; where it is not given the family's own, which mostly is for plain LoRA alone."""
    if options.output.save_naming is not None or family.FILE_NAMING == "kohya":
        return options.output.save_naming or "kohya"
    if family.NAMES_EVERY_KIND:
        return family.FILE_NAMING
    ends = {name.partition(".")[2] for name in network.tensors()}
    return family.FILE_NAMING if ends <= {DOWN, UP, "alpha"} else "kohya"


def files_of(options: Options) -> tuple[AdapterFile | None, AdapterFile | None]:
    """The file of --network_weights, and the one that the sizes are from: the same with --dim_from_weights."""
    wanted = options.network
    start = None
    if wanted.network_weights is not None:
        both = options.embedding.weights == wanted.network_weights
        start = files.read(wanted.network_weights, keep_embeddings=both)
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
    """The parts of the model that get adapters."""
    wanted = options.network
    trained = {"text_encoder": not wanted.network_train_unet_only, "unet": not wanted.network_train_text_encoder_only}
    return [part for part, is_trained in trained.items() if is_trained]


def parameter_groups(network: TrainableNetwork, options: Options) -> ParameterGroups:
    """The network's parameters in groups, with the rates of the options. Raises UserError."""
    return network.groups(
        LearningRates(
            text_encoder=options.optimizer.text_encoder_lr,
            unet=options.optimizer.unet_lr,
            default=options.optimizer.learning_rate,
            layer_decay=options.optimizer.lr_layer_decay,
            embedding=options.embedding.embedding_lr,
        )
    )
