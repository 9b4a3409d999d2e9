"""Kohya's network protocol, and safe ways to call modules that others wrote to it.

A network module is a Python module with `create_network(multiplier, network_dim, network_alpha, vae, text_encoder,
unet, …) -> Network`. Ours follow this protocol; third-party ones (LyCORIS and others) follow it more or less, and the
functions here take up the slack, so that the trainer treats all alike.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.checkpoints.adapter_file import describe
from networks.network import AdapterNetwork
from networks.weights import LoadReport, by_module, check_loaded, compare

logger = logging.getLogger(__name__)


class Network(Protocol):
    """What every network has. It is a `torch.nn.Module` as well."""

    def apply_to(
        self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None: ...
    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, default_lr: Any) -> Any: ...
    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None: ...
    def enable_gradient_checkpointing(self) -> None: ...
    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None: ...
    def get_trainable_params(self) -> Iterable[nn.Parameter]: ...
    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None: ...
    def load_weights(self, file: str) -> Any: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


def optimizer_groups(
    network: Network,
    *,
    text_encoder_lr: float | Sequence[float] | None,
    unet_lr: float | None,
    default_lr: float,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The network's parameter groups, each with "params" (a list), "lr" and a "name" that no other group has.

    Modules return a list of groups, or (groups, descriptions); newer ones take a list of text encoder rates under
    another name, the oldest know no `default_lr`. `layer_decay` is for our own networks only.
    """
    if layer_decay is not None:
        assert isinstance(network, AdapterNetwork), "refused before"
        network.layer_decay = layer_decay
    prepare = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    if prepare is None:
        prepare, text_encoder_lr = network.prepare_optimizer_params, _single_rate(text_encoder_lr)
    arguments = [text_encoder_lr, unet_lr, default_lr]
    found = prepare(*arguments[: len(inspect.signature(prepare).parameters)])
    groups, descriptions = found if isinstance(found, tuple) else (found, None)
    groups = list(groups)
    if not groups:
        raise UserError("the network trains nothing: no parameter group has a learning rate above 0")
    if descriptions is None or len(descriptions) != len(groups):
        descriptions = [group.get("name", f"group_{i}") for i, group in enumerate(groups)]
    names = _unique([str(name).replace("textencoder", "text_encoder").replace(" ", "_") for name in descriptions])
    return [
        {"lr": default_lr, **group, "params": list(group["params"]), "name": name}
        for group, name in zip(groups, names, strict=True)
    ]


def _single_rate(rates: float | Sequence[float] | None) -> float | None:
    if rates is None or isinstance(rates, int | float):
        return rates
    if len(set(rates)) > 1:
        raise UserError(f"text_encoder_lr: this network module takes one rate, not {list(rates)}")
    return rates[0] if rates else None


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def load_weights(network: Network, file: str, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Load a file into an applied network. `tensors`: what it holds, in kohya's names (`weights.read_weights`).

    `UserError` if nothing fits or a layer has other shapes; what does not fit is told. Third-party modules load from
    files and without saying what matched: for them the tensors are compared here, and handed over in a file with
    kohya's names that holds tensors only.
    """
    if isinstance(network, AdapterNetwork):
        return network.load_tensors(tensors, file)
    ours = network.state_dict()
    _refuse_another_kind(ours, file, tensors)
    modules = by_module(tensors).keys()
    # what a file does not say stays as it is: old files have no alpha
    unsaid = {key: ours[key] for key in ours if key.endswith(".alpha") and key.partition(".")[0] in modules}
    theirs = {**unsaid, **tensors}
    report = compare(ours, theirs)
    check_loaded(report, file)
    for key in unsaid:
        if theirs[key].numel() == 1 and theirs[key].item() != ours[key].item():
            raise UserError(
                f"{file}: {key} is {theirs[key].item():g} there and {ours[key].item():g} here, and this network module "
                "keeps its own: give --dim_from_weights, or the same --network_alpha"
            )
    with tempfile.TemporaryDirectory() as folder:
        converted = str(Path(folder) / "weights.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, converted)
        network.load_weights(converted)
    return report


def file_tensors(network: Network) -> Mapping[str, Tensor]:
    """What the network's file holds, as far as it can be told: others than ours may write something else."""
    return network.file_tensors() if isinstance(network, AdapterNetwork) else network.state_dict()


def _refuse_another_kind(ours: Mapping[str, Tensor], file: str, tensors: Mapping[str, Tensor]) -> None:
    """`UserError` where a file's layers are of none of the kinds that the network's are."""
    kinds = [describe({name: tuple(tensor.shape) for name, tensor in table.items()}) for table in (ours, tensors)]
    network, theirs = kinds
    if network and theirs and theirs.layers and not network.layers.keys() & theirs.layers.keys():
        fitting = "--network_module networks.lora, or LyCORIS' algo=lora" if theirs.is_plain else theirs.made_by
        advice = f". It goes with {fitting}" if fitting else ""
        raise UserError(f"--network_weights {file} is {theirs.title}, and the network here is {network.title}{advice}")


def step_hook(network: Network) -> Any:
    """The function to call as (text_encoder, unet) before each step: some third-party modules have one."""
    return getattr(network, "on_step_start", lambda text_encoder, unet: None)


def check_max_norm(network: Network) -> None:
    """`UserError` if `scale_weight_norms` cannot work with this network."""
    if not hasattr(network, "apply_max_norm_regularization"):
        raise UserError("scale_weight_norms: this network module does not support it (it has no such method)")


@contextmanager
def without(network: Network) -> Iterator[None]:
    """Run the base alone inside this context, as for a picture "without" the adapter."""
    if not hasattr(network, "set_multiplier"):
        raise UserError("this network module cannot be switched off (it has no set_multiplier)")
    before = getattr(network, "multiplier", 1.0)
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(before)
