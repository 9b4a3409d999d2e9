"""Networks of other packages, such as LyCORIS, behind the protocol of our own.

Such a package is a Python module with kohya's `create_network(multiplier, network_dim, network_alpha, vae,
text_encoder, unet, …)`, whose networks follow kohya's protocol more or less. This is the only file that asks by
reflection what a network can do.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.config.registry import Arguments
from library.errors import UserError
from library.models.checkpoints.adapter_file import describe
from networks import kinds
from networks.adapter import Capability
from networks.files import AdapterFile
from networks.load_report import LoadReport, by_module, check_loaded, compare
from networks.network import Group, TrainableNetwork
from networks.settings import Asked, LearningRates

if TYPE_CHECKING:
    from library.models.family import AdapterTargets

logger = logging.getLogger(__name__)

# LyCORIS's and kohya's arguments that are about convolutions larger than 1 × 1 alone
_OF_CONVOLUTIONS = ("conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_conv_cp")


@dataclass(frozen=True)
class BaseModel:
    """The loaded parts of a base model as kohya's modules know them, and the denoiser itself.

    text_encoders: a module, or a list of them. unet: with the paths that such modules expect.
    """

    vae: nn.Module | None
    text_encoders: Any
    unet: Any
    denoiser: nn.Module | None


def create(
    module: str,
    model: BaseModel,
    targets: Sequence[AdapterTargets],
    asked: Asked,
    arguments: Arguments,
    *,
    file: AdapterFile | None = None,
) -> ForeignNetwork:
    """The network that a module makes, called as kohya's scripts call it. `file`: take ranks and alphas from it.

    The initial weights come from torch's own stream of random numbers. `UserError` for settings that it refuses.
    """
    creator = getattr(importlib.import_module(module), kinds.creator("", from_file=file is not None)[1:])
    known = inspect.signature(creator).parameters
    given = {name: value for name, value in {"targets": targets, "seed": asked.seed}.items() if name in known}
    parts = (model.vae, model.text_encoders, model.unet)
    with _refusals(module):
        if file is not None:
            # the tensors as well: whatever names the file has, these are kohya's
            network, _ = creator(1.0, file.source, *parts, weights_sd=file.tensors, **arguments, **given)
        else:
            own = {"neuron_dropout": asked.dropout}
            network = creator(1.0, asked.dim, asked.alpha, *parts, **own, **arguments, **given)
    return ForeignNetwork(network, model, module=module, arguments=arguments)


@contextmanager
def _refusals(module: str) -> Iterator[None]:
    """Third-party modules refuse settings in many ways, and know no UserError."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--network_module {module} refuses these settings: {error!r}") from error


class ForeignNetwork(TrainableNetwork):
    """A third party's network, which is a `torch.nn.Module` with kohya's methods."""

    def __init__(self, network: Any, model: BaseModel, *, module: str = "", arguments: Arguments | None = None) -> None:
        """`module`, `arguments`: --network_module and --network_args, for messages."""
        super().__init__()
        self.network, self.training = network, network.training
        self._model, self._module, self._arguments = model, module, dict(arguments or {})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped network's: states and files have its own names."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def attach(self, parts: Collection[str]) -> None:
        model = self._model
        self.network.apply_to(model.text_encoders, model.unet, "text_encoder" in parts, "unet" in parts)
        self._warn_of_idle_convolutions()

    def _warn_of_idle_convolutions(self) -> None:
        """Warn of settings of convolutions that have no effect, because the module has left these layers out."""
        given = [name for name in _OF_CONVOLUTIONS if self._arguments.get(name) not in (None, "", "0", "False")]
        if not given or self._model.unet is None:
            return
        adapted = by_module(self.network.state_dict()).keys()
        large = {
            f"lora_unet_{path}".replace(".", "_")
            for path, layer in self._model.unet.named_modules()
            if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
        }
        if adapted and not adapted & large:
            logger.warning(
                "--network_args: %s without effect: this network has no convolution larger than 1 × 1%s",
                *(", ".join(given), f" (preset={self._arguments['preset']})" if "preset" in self._arguments else ""),
            )

    def before_training(self, *, gradient_checkpointing: bool) -> None:
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.network.prepare_grad_etc(self._model.text_encoders, self._model.unet)

    def groups(self, learning_rates: LearningRates) -> list[Group]:
        """Modules return a list of groups, or (groups, descriptions); newer ones take a list of text encoder rates
        under another name, the oldest know no default rate."""
        assert learning_rates.layer_decay is None, "refused before"
        text_encoder_lr, default_lr = learning_rates.text_encoder, learning_rates.default
        prepare = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if prepare is None:
            prepare, text_encoder_lr = self.network.prepare_optimizer_params, _single_rate(text_encoder_lr)
        arguments = [text_encoder_lr, learning_rates.unet, default_lr]
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

    def start_epoch(self) -> None:
        self.network.on_epoch_start(None, self._model.denoiser)
        self.training = self.network.training  # which the module sets by itself

    def before_batch(self) -> None:
        """Some modules have something to do before each step."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(None, self._model.denoiser)

    def at_noise(self, share_B: Tensor) -> None:
        """No-op: kohya's protocol has none."""

    def penalty(self) -> None:
        """Kohya's protocol has none."""

    def after_step(self, done: int, total: int) -> None:
        """No-op: kohya's protocol has none."""

    @contextmanager
    def at(self, multiplier: float) -> Iterator[None]:
        before = getattr(self.network, "multiplier", 1.0)
        if multiplier == before:
            yield
            return
        if refusal := self.refuses("off"):
            raise UserError(refusal)
        self.network.set_multiplier(multiplier)
        try:
            yield
        finally:
            self.network.set_multiplier(before)

    def refuses(self, capability: Capability) -> str | None:
        if capability == "sharded_gradients":
            return "networks of other packages with DeepSpeed's ZeRO-2: only this program's kinds of adapters"
        method, refusal = {
            "off": ("set_multiplier", "this network module cannot be switched off (it has no set_multiplier)"),
            "scale_weight_norms": (
                "apply_max_norm_regularization",
                "scale_weight_norms: this network module does not support it (it has no such method)",
            ),
        }[capability]
        return None if hasattr(self.network, method) else refusal

    def tensors(self) -> Mapping[str, Tensor]:
        """The trained tensors: the module may write something else."""
        tensors: Mapping[str, Tensor] = self.network.state_dict()
        return tensors

    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        self.network.save_weights(str(file), dtype, metadata)

    def load(self, file: AdapterFile) -> LoadReport:
        """Such modules load from files and without a report: the tensors are compared here, and handed over in a file
        with kohya's names that holds tensors only."""
        source, tensors = file.source, file.tensors
        ours = self.network.state_dict()
        _refuse_another_kind(ours, source, tensors)
        # what a file leaves out stays as it is: old files have no alpha
        unsaid = {key: ours[key] for key in ours if key.endswith(".alpha") and key.partition(".")[0] in file.layers}
        theirs = {**unsaid, **tensors}
        report = compare(ours, theirs)
        check_loaded(report, source, sized_by_file=False)
        for key in unsaid:
            if theirs[key].numel() == 1 and theirs[key].item() != ours[key].item():
                raise UserError(
                    f"{source}: {key} is {theirs[key].item():g} there and {ours[key].item():g} here, and this network "
                    "module keeps its own: give --dim_from_weights, or the same --network_alpha"
                )
        with tempfile.TemporaryDirectory() as folder:
            converted = str(Path(folder) / "weights.safetensors")
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, converted)
            self.network.load_weights(converted)
        return report

    def layers(self) -> list[str]:
        return []

    def norms(self) -> None:
        """Not known."""

    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        device = next(self.network.parameters()).device
        found: tuple[int, float, float] = self.network.apply_max_norm_regularization(limit, device)
        return found

    def counts(self) -> dict[str, int]:
        return {}

    def layer_counts(self) -> dict[str, dict[str, int]]:
        return {}

    def parameter_counts(self) -> dict[str, int]:
        return {}

    def ranks(self) -> None:
        return None


def _single_rate(rates: float | Sequence[float] | None) -> float | None:
    if rates is None or isinstance(rates, int | float):
        return rates
    if len(set(rates)) > 1:
        raise UserError(f"text_encoder_lr: this network module takes one rate, not {list(rates)}")
    return rates[0] if rates else None


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _refuse_another_kind(ours: Mapping[str, Tensor], source: str, tensors: Mapping[str, Tensor]) -> None:
    """`UserError` where a file's layers are of none of the kinds that the network's are."""
    found = [describe({name: tuple(tensor.shape) for name, tensor in table.items()}) for table in (ours, tensors)]
    network, theirs = found
    if network and theirs and theirs.layers and not network.layers.keys() & theirs.layers.keys():
        fitting = "--network_module networks.lora, or LyCORIS' algo=lora" if theirs.is_plain else theirs.made_by
        advice = f". It goes with {fitting}" if fitting else ""
        raise UserError(
            f"--network_weights {source} is {theirs.title}, and the network here is {network.title}{advice}"
        )
