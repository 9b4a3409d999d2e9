"""The run's network on the outline of the model, to refuse what does not fit before any weight of the model is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library import log
from library.config import registry, source
from library.errors import UserError
from library.run.encode import trains_text
from library.run.network import create, parameter_groups
from library.training.state import State, network_of
from networks.merge import BaseWeights
from networks.network import AdapterNetwork
from networks.weights import check_loaded, compare, read_weights, some_names

if TYPE_CHECKING:
    from library.config.options import Options
    from library.models.family import ModelFamily


def rehearse(
    family: ModelFamily, options: Options, creator: str, arguments: dict[str, Any], *, resume: State | None
) -> frozenset[int]:
    """`UserError` where model, LoRA files, settings of the network, rates or a state's network do not fit together.

    Returns the sizes of the kernels that the network trains. Networks of other packages cannot be made without
    weights: what they refuse comes when the model is loaded.
    """
    with family.outlined(), log.errors_only(), torch.no_grad():
        BaseWeights(options.network.base_weights, options.network.base_weights_multiplier or ()).check(
            family.adapter_targets()
        )
        if not source.is_ours(options.network.network_module):
            return frozenset()
        network = _network(family, options, creator, arguments)
        parameter_groups(network, options)
        if resume is not None and options.run.resume_anyway:  # else the settings are compared, which says more
            report = compare(network.state_dict(), network_of(resume))
            if different := [*report.mismatched, *report.missing, *report.unexpected]:
                raise UserError(f"--resume {resume.folder}: its network is not this run's:{some_names(different)}")
        return frozenset(parameter.shape[-1] for parameter in network.parameters() if parameter.dim() == 4)


def _network(family: ModelFamily, options: Options, creator: str, arguments: dict[str, Any]) -> AdapterNetwork:
    """As the run's own, without content."""
    wanted = options.network
    function = registry.load_path(f"{wanted.network_module}.{creator}", where="--network_module")
    file = wanted.network_weights
    start = None if file is None else read_weights(file)
    try:
        network = create(function, wanted, start, (None, None, None), arguments | {"targets": family.adapter_targets()})
    except UserError as error:
        raise UserError(f"--network_module {wanted.network_module}: {error}") from None
    assert isinstance(network, AdapterNetwork), "one of ours"
    network.apply_to(None, None, trains_text(options), not wanted.network_train_text_encoder_only)
    if start is not None:
        check_loaded(network.compare_tensors(start)[0], f"--network_weights {file}")
    return network
