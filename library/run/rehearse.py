"""Makes the run's network on the outline of the model: mismatches are refused before any of its weights is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from library import log
from library.config.registry import Arguments
from library.errors import UserError
from library.offload import swap
from library.run import base_weights
from library.run.network import asked_of, files_of, make_embedding, naming_of, parameter_groups, parts_of
from library.training.state import State, network_of
from networks import create, kinds
from networks.embeddings.together import WithEmbedding
from networks.formats import loaders
from networks.formats.naming import in_names_of
from networks.load_report import check_loaded, compare, some_names
from networks.network import Network, TrainableNetwork

if TYPE_CHECKING:
    from library.config.options import Options
    from library.models.family import ModelFamily


class Rehearsed(NamedTuple):
    """The sizes of the kernels that the network trains, and how many numbers it trains. Nothing is known of networks of
    other packages, which cannot be made without weights."""

    kernels: frozenset[int] = frozenset()
    parameters: int | None = None


def rehearse(family: ModelFamily, options: Options, arguments: Arguments, *, resume: State | None) -> Rehearsed:
    """`UserError` if model, LoRA files, settings of the network, rates or a state's network do not fit together; for
    networks of other packages that comes after the model is loaded."""
    with family.outlined(), log.errors_only(), torch.no_grad():
        if options.precision.blocks_to_swap:
            swap.refuse_useless(family.swap_blocks(), options.precision.blocks_to_swap)
        base_weights.check(options.network, family)
        embedding = make_embedding(options, family)
        if options.embedding.train_embedding_only:
            assert embedding is not None, "it needs a --token_string"
            return _checked(embedding, options, resume)
        if (kind := kinds.kind_of(options.network.network_module, options.network.network_args)) is None:
            _refuse_naming(options)
            if options.precision.blocks_to_swap:
                raise UserError(kinds.refuses(options.network.network_module, "blocks_to_swap") or "")
            return Rehearsed()
        network = _network(kind, family, options, arguments)
        _check_naming(network, family, options)
        if embedding is not None:
            return _checked(WithEmbedding(network, embedding, bundle=False), options, resume)
        return _checked(network, options, resume)


def _checked(network: TrainableNetwork, options: Options, resume: State | None) -> Rehearsed:
    """`UserError` if rates or a state's network do not fit it."""
    groups = parameter_groups(network, options)
    if resume is not None and options.run.resume_anyway:  # otherwise the settings are compared, with a better message
        report = compare(network.state_dict(), network_of(resume))
        if different := [*report.mismatched, *report.missing, *report.unexpected]:
            raise UserError(f"--resume {resume.folder}: its network is not this run's:{some_names(different)}")
    return Rehearsed(
        kernels=frozenset(parameter.shape[-1] for parameter in network.parameters() if parameter.dim() == 4),
        parameters=sum(parameter.numel() for group in groups for parameter in group["params"]),
    )


def _refuse_naming(options: Options) -> None:
    if options.output.save_naming == "diffusers":
        raise UserError(
            f"--save_naming {options.output.save_naming}: networks of --network_module "
            f"{options.network.network_module} write their files themselves, in their own names"
        )


def _check_naming(network: Network, family: ModelFamily, options: Options) -> None:
    """`UserError` for a kind of adapter or a family without names in --save_naming."""
    naming = naming_of(network, family, options)
    if naming != "kohya" and not loaders.is_about(family.base_model_version):
        raise UserError(f"--save_naming {naming}: {family.TITLE} has no such names here, only kohya's")
    in_names_of(network.tensors(), naming, source=f"--save_naming {naming}")


def _network(kind: str, family: ModelFamily, options: Options, arguments: Arguments) -> Network:
    """The run's network without values."""
    wanted, (start, sizes) = options.network, files_of(options)
    asked = asked_of(options)
    try:
        network = create.make(kind, family.adapter_targets(), asked, arguments, file=sizes)
    except UserError as error:
        raise UserError(f"--network_module {wanted.network_module}: {error}") from None
    network.attach(parts_of(options))
    if start is not None:
        where = f"--network_weights {wanted.network_weights}"
        check_loaded(network.compare(start)[0], where, sized_by_file=network.sized_by_file)
    return network
