"""The adapter network of a run: made by our module or a third party's, on the model, with its starting weights."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library import rng
from library.config import source
from library.config.options import NetworkOptions, Options
from library.errors import UserError
from library.run.encode import DTYPES, trains_text
from networks.protocol import check_max_norm, load_weights, optimizer_groups
from networks.weights import by_module, read_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.optimizers.create import ParameterGroups
    from library.run.plan import Plan

logger = logging.getLogger(__name__)

# LyCORIS's and kohya's arguments that are about convolutions larger than 1 × 1 alone
_OF_CONVOLUTIONS = ("conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_conv_cp")


def make_network(plan: Plan, accelerator: Accelerator) -> Any:
    """Attached to the loaded parts of the model, in its precision, on its device. Raises UserError."""
    options, family = plan.options, plan.family
    wanted = options.network
    module = importlib.import_module(wanted.network_module)
    creator = getattr(module, plan.network_creator)
    ours = {"targets": family.adapter_targets(), "seed": plan.seed}
    arguments = plan.network_arguments | {
        name: value for name, value in ours.items() if name in inspect.signature(creator).parameters
    }
    text_encoders, unet = family.third_party_views()
    start = None if wanted.network_weights is None else read_weights(wanted.network_weights)
    # A third party's initial weights come from torch's own stream, which every process begins anywhere.
    torch.manual_seed(rng.key_of(plan.seed, "network") >> 1)
    with _refusals(wanted.network_module):
        network = create(creator, wanted, start, (family.components.get("vae"), text_encoders, unet), arguments)
    if wanted.scale_weight_norms:
        check_max_norm(network)
    trains_unet = not wanted.network_train_text_encoder_only
    network.apply_to(text_encoders, unet, trains_text(options), trains_unet)
    _warn_of_idle_convolutions(network, plan.network_arguments, unet, wanted.network_module)
    if start is not None:
        assert wanted.network_weights is not None
        load_weights(network, wanted.network_weights, start)
    if options.precision.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    full = options.precision.full_fp16 or options.precision.full_bf16
    network.to(accelerator.device, DTYPES[options.precision.mixed_precision] if full else torch.float32)
    network.prepare_grad_etc(text_encoders, unet)
    return network


def create(
    creator: Callable[..., Any],
    wanted: NetworkOptions,
    start: Mapping[str, Tensor] | None,
    model: tuple[Any, Any, Any],
    arguments: Mapping[str, Any],
) -> Any:
    """What a module's `create_network` or `create_network_from_weights` returns, called as kohya's scripts call them.

    `start`: the tensors of --network_weights; `model`: VAE, text encoders and UNet, which ours does not need.
    """
    if wanted.dim_from_weights:
        # the tensors as well: whatever names the file has, these are kohya's
        network, _ = creator(1.0, wanted.network_weights, *model, weights_sd=start, **arguments)
        return network
    own = {"neuron_dropout": wanted.network_dropout}
    return creator(1.0, wanted.network_dim, wanted.network_alpha, *model, **own, **arguments)


def parameter_groups(network: Any, options: Options) -> ParameterGroups:
    """Its parameters with the rates that the options give them. Raises UserError."""
    return optimizer_groups(
        network,
        text_encoder_lr=options.optimizer.text_encoder_lr,
        unet_lr=options.optimizer.unet_lr,
        default_lr=options.optimizer.learning_rate,
        layer_decay=options.optimizer.lr_layer_decay,
    )


@contextmanager
def _refusals(module: str) -> Iterator[None]:
    """Third-party modules refuse settings in many ways, and know no UserError."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if source.is_ours(module):
            raise
        raise UserError(f"--network_module {module} refuses these settings: {error!r}") from error


def _warn_of_idle_convolutions(network: Any, arguments: Mapping[str, Any], unet: Any, module: str) -> None:
    """Say which settings of convolutions have no effect, because another's module has left these layers out."""
    given = [name for name in _OF_CONVOLUTIONS if arguments.get(name) not in (None, "", "0", "False")]
    if source.is_ours(module) or not given or unet is None:
        return
    adapted = by_module(network.state_dict()).keys()
    large = {
        f"lora_unet_{path}".replace(".", "_")
        for path, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Conv2d) and max(layer.kernel_size) > 1
    }
    if adapted and not adapted & large:
        logger.warning(
            "--network_args: %s without effect: this network has no convolution larger than 1 × 1%s",
            *(", ".join(given), f" (preset={arguments['preset']})" if "preset" in arguments else ""),
        )
