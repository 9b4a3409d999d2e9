"""The parts of a base model: loaded, outlined, held in a format, fingerprinted and released one by one, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.config.registry import load_path
from library.errors import UserError
from library.files.json_text import Config
from library.out_of_memory import during

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.files.tensors import TensorEntry
    from library.models.blocks import Blocks
    from library.models.checkpoints.base_model import Part
    from library.models.checkpoints.weights import Change
    from library.quantization.frozen import Held

    Merged = Mapping[tuple[nn.Module, str], Change]  # by a layer and the name of one of its parameters

NOTHING = re.compile(r"(?!)")
# transformers has a newer name since 5.23, diffusers its own
_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class PartKind:
    """A family's declaration of one part.

    folder: its folder in a diffusers folder. title: its name in messages. new: the import path of a function that
    makes the module from its configuration, with its parameters on the meta device. section: "unet" for the denoiser
    and "text_encoder" for the text encoders, as rates, groups and metadata have it; "" where adapters never sit.
    prefix: the beginning of its keys in adapter files. linear: the paths of Linear and 1 × 1 convolution layers that
    adapters sit on, if it has a section, and that a format is for. conv: the paths of further layers, if convolutions
    are adapted. more: the paths that a preset for everything takes beside these. choices: for presets that take a part
    of `linear`, that part by the preset's name. blocks: its numbered blocks, by which rates and ranks can differ.
    layer: for parts without blocks, a pattern of the names in adapter files, whose first group is a layer's number
    from the input on. overflows_fp16: its activations do not fit into fp16, so it is loaded in bf16 where that is
    asked for.
    """

    folder: str
    title: str
    new: str
    section: str = ""
    prefix: str = ""
    linear: re.Pattern[str] = NOTHING
    conv: re.Pattern[str] = NOTHING
    more: re.Pattern[str] = NOTHING
    choices: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    blocks: Blocks | None = None
    layer: re.Pattern[str] | None = None
    overflows_fp16: bool = False


class Components:
    """A base model's parts by name: "denoiser", "vae", "text_encoder", "text_encoder_2", …

    `kinds`: what the family declares of them. `sources`: where the weights of each are; a part without any, which the
    family does without, is none of the model's.
    """

    def __init__(self, kinds: Mapping[str, PartKind], sources: Mapping[str, Part]) -> None:
        self._kinds = {name: kind for name, kind in kinds.items() if name in sources}
        self._sources = sources
        self._modules: dict[str, nn.Module] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the part is there: loaded, or as an outline."""
        return name in self._modules

    def __getitem__(self, name: str) -> nn.Module:
        assert name in self._modules, f"the part '{name}' is not loaded"
        return self._modules[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Set a part to a module that was made elsewhere."""
        self._modules[name] = module

    def get(self, name: str) -> nn.Module | None:
        """The part, or None where it is not there."""
        return self._modules.get(name)

    @property
    def names(self) -> list[str]:
        """The names of all parts of the model, loaded or not."""
        return list(self._kinds)

    @property
    def text_encoders(self) -> list[str]:
        """The names of all text encoders of the model, loaded or not."""
        return [name for name in self._kinds if name.startswith("text_encoder")]

    @property
    def have_text_encoders(self) -> bool:
        """Whether all of them are there."""
        return all(name in self for name in self.text_encoders)

    def loaded(self, *names: str) -> list[nn.Module]:
        """The loaded ones of these parts; of all parts if none is named."""
        return [self._modules[name] for name in names or self._kinds if name in self._modules]

    def config(self, name: str) -> Config:
        """The part's configuration."""
        return self._sources[name].config

    def entries(self, name: str) -> Mapping[str, TensorEntry]:
        """Where each of the part's weights lies, by its name in the module."""
        return self._sources[name].entries()

    def load(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        held: Held | None = None,
        merged: Callable[[], Merged] | None = None,
        apart: Callable[[], Iterable[nn.Module]] = tuple,
    ) -> nn.Module:
        """Make the part and read its weights, as `dtype` on `device`: frozen and in evaluation mode.

        held: how the weights of the layers that adapters can sit on are held; None: as they are. merged: is called when
        the part exists as an outline; what becomes of its weights before they are held. Each tensor is merged and
        packed as soon as it is read, so that the part never is in `dtype` as a whole. apart: is called when `merged`
        is; the layers whose weights go to the CPU, each as soon as it is packed.
        """
        from library.models.checkpoints.weights import fill
        from library.quantization.frozen import compute_frozen

        source, dtype = self._sources[name], self.dtype(name, dtype)
        module = self._modules[name] = self._new(name)
        changes = {} if merged is None else _by_name(module, merged())
        layers = {} if held is None else self.adapted(name)
        for path in layers:
            assert held is not None
            pack = held.packing(f"{self._kinds[name].prefix} {path}")
            before = changes.get(f"{path}.weight")
            changes[f"{path}.weight"] = pack if before is None else _one_after_the_other(before, pack)
        for key in _by_name(module, {(layer, "weight"): _to_cpu for layer in apart()}):
            changes[key] = _one_after_the_other(changes[key], _to_cpu) if key in changes else _to_cpu
        with during(f"loading the {self._kinds[name].title}"):
            fill(module, source.entries(), dtype=dtype, device=device, where=source.where, changes=changes)
            for layer in layers.values():
                compute_frozen(layer)
            for owner in module.modules():  # the parameters are where they belong
                owner._buffers.update({key: None if b is None else b.to(device) for key, b in owner._buffers.items()})
            module.eval()
        return self._modules[name]

    def dtype(self, name: str, asked: torch.dtype) -> torch.dtype:
        """The dtype that the part is loaded in where this one is asked for."""
        import torch

        return torch.bfloat16 if self._kinds[name].overflows_fp16 and asked == torch.float16 else asked

    def adapted(self, name: str) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers of a part that adapters can sit on, by their paths."""
        from torch import nn

        kind = self._kinds[name]
        return {
            path: layer
            for path, layer in self[name].named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and (kind.linear.fullmatch(path) or kind.conv.fullmatch(path))
        }

    def load_all(self, names: Iterable[str], dtype: torch.dtype, device: torch.device | str) -> None:
        """`load` each of them."""
        for name in names:
            self.load(name, dtype, device)

    def release(self, *names: str) -> None:
        """Drop these parts, so that their memory becomes free."""
        for name in names:
            self._modules.pop(name, None)

    @contextmanager
    def outlined(self) -> Iterator[None]:
        """A context in which all parts that are not absent exist without their weights, on the meta device, so that
        adapters and files can be checked against them. UserError if a part's weights do not fit its configuration."""
        before, self._modules = self._modules, {}
        try:
            for name in self._kinds:
                if not self.absent(name):
                    self._modules[name] = self._outline(name)
            yield
        finally:
            self._modules = before

    def absent(self, name: str) -> bool:
        """Whether the part lies nowhere: only its usual configuration is known."""
        return self._sources[name].absent

    def size(self, name: str) -> int:
        """The number of the part's parameters, loaded or not."""
        return sum(entry.count for entry in self.entries(name).values())

    def _outline(self, name: str) -> nn.Module:
        from library.models.checkpoints.weights import check_fit

        source = self._sources[name]
        try:
            module = self._new(name)
        except Exception as error:  # diffusers and transformers raise errors of many classes for bad configurations
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{source.where}: no model can be made of this configuration: {reason}") from error
        check_fit(module, source.entries(), source.where)
        return module

    def _new(self, name: str) -> nn.Module:
        make = load_path(self._kinds[name].new, where=f"the part '{name}'")
        module: nn.Module = make(self._sources[name].config)
        return module

    def checkpoint(self, *names: str, by: Callable[..., Any] | None = None) -> None:
        """Compute the activations of these parts anew in the backward pass, which takes time and saves memory.

        by: calls a block with its inputs and keeps these for the backward pass (`library.offload.checkpoints`); only
        diffusers' modules take one. None: torch's own.
        """
        for name in names:
            module: Any = self[name]
            if by is not None:
                module.enable_gradient_checkpointing(by)
                continue
            next(getattr(module, enable) for enable in _CHECKPOINTING if hasattr(module, enable))()

    def fingerprint(self, name: str) -> str:
        """A hash of the part's configuration and weights, which are read once."""
        from library.models.fingerprint import part_fingerprint

        return part_fingerprint(self._sources[name])


def _by_name(module: nn.Module, merged: Merged) -> dict[str, Change]:
    paths = {layer: path for path, layer in module.named_modules()}
    return {f"{paths[layer]}.{leaf}": change for (layer, leaf), change in merged.items()}


def _to_cpu(weight: Tensor) -> Tensor:
    return weight.to("cpu")


def _one_after_the_other(first: Change, second: Change) -> Change:
    return lambda weight: second(first(weight))
