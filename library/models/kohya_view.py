"""Models with the module paths that kohya's network modules expect.

The layers and their weights are the models' own: whatever a network module attaches to a layer takes effect in the
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

_BLOCK = re.compile(r".*\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+")


class TextModelView(nn.Module):
    """Shows a CLIPTextModel under "text_model.", the level that transformers 5 dropped and that keys in files name.

    None makes a view without any module.
    """

    def __init__(self, encoder: nn.Module | None) -> None:
        super().__init__()
        if encoder is not None:
            self.text_model = encoder

    def forward(self, *args: object, **kwargs: object) -> object:
        """The encoder's answer."""
        return self.text_model(*args, **kwargs)


class PlainUNetView(nn.Module):
    """Shows a diffusers UNet with its paths, but its time embedding as a plain module.

    LyCORIS 4 chooses the time embedding by its class (for other models) and its layers by their names as well, and
    stops because it finds them twice. Without the class they are chosen once, by their names, as by LyCORIS 3.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        for name, child in unet.named_children():
            if name == "time_embedding":
                plain = nn.Module()
                for layer, module in child.named_children():
                    plain.add_module(layer, module)
                child = plain
            self.add_module(name, child)
        self.__dict__["_unet"] = unet  # no child: its modules would have a second path

    def __getattr__(self, name: str) -> Any:
        """The UNet's configuration, type and whatever else a network module asks for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_unet" not in self.__dict__:
                raise
            return getattr(self.__dict__["_unet"], name)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The UNet's answer."""
        return self._unet(*args, **kwargs)


class OriginalUNetView(nn.Module):
    """Shows the layers of a diffusers UNet under their names in the original layout, as kohya's own SDXL UNet has them.

    Modules are often chosen by the class name of their block, so the module that holds a block's layers has a class of
    the same name.
    """

    def __init__(self, unet: nn.Module, name: Callable[[str], str]) -> None:
        """`name`: from a layer's path in `unet` to the original one."""
        super().__init__()
        for path, block in unet.named_modules():
            if not _BLOCK.fullmatch(path):
                continue
            inner = [layer for layer, _ in _layers(block)]
            words = name(f"{path}.{inner[0]}").split(".")
            place = words[: 2 if words[0] == "middle_block" else 3]
            if all(name(f"{path}.{layer}") == ".".join([*place, layer]) for layer in inner):
                _put(self, place, block)
            else:
                _put(self, place, type(type(block).__name__, (nn.Module,), {})())
        for path, layer in _layers(unet):
            _put(self, name(path).split("."), layer)

    def forward(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError("a view of the layers alone")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have weights of their own, by their paths."""
    return ((path, module) for path, module in model.named_modules() if module._parameters)


def _put(root: nn.Module, words: Sequence[str], module: nn.Module) -> None:
    """Add a module at a path, with plain modules above it where there are none."""
    owner = root
    for word in words[:-1]:
        if word not in owner._modules:
            owner.add_module(word, nn.Module())
        owner = owner.get_submodule(word)
    owner.add_module(words[-1], module)
