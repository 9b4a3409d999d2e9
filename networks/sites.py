"""The layers of a base model that adapters sit on, and their names in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from library.errors import UserError

if TYPE_CHECKING:
    from library.models.blocks import Blocks
    from library.models.family import AdapterTargets

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A layer of the base model that an adapter can sit on."""

    name: str  # in files: lora_unet_down_blocks_0_attentions_0_proj_in
    section: str  # "unet", "text_encoder"; with several encoders "text_encoder_1", "text_encoder_2"
    part: str  # "unet" or "text_encoder"
    module: nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm
    path: str = ""  # the same with dots and without the prefix: down_blocks.0.attentions.0.proj_in
    alias: str = ""  # its name in files in diffusers' or PEFT's naming, where that is another one
    block: int | None = None  # the numbered block that it lies in
    fused: str = ""  # its name in files where it shares one with others, see networks.formats.fused
    place: int = 0  # of its rows among theirs
    prefix: str = ""  # that of its part, of which `name` begins
    depth: int | None = None  # its block, or its layer of a text encoder: the larger, the farther from the input

    @property
    def short(self) -> str:
        """The last two words of its path, without numbers: "attn1.to_q"."""
        return ".".join([word for word in self.path.split(".") if not word.isdecimal()][-2:])

    @property
    def spatial(self) -> bool:
        """Whether this is a convolution wider than 1x1: such layers have a rank of their own."""
        return is_spatial(self.module)


def is_spatial(module: nn.Module) -> bool:
    """Whether this is a convolution wider than 1x1."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


Wanted = Callable[["AdapterTargets", str, nn.Module], bool]  # a part, the path of a layer in it, the layer


def find_sites(targets: Sequence[AdapterTargets], *, conv: bool) -> list[Site]:
    """Every Linear and Conv2d whose path the targets' patterns match as a whole, in the order of the model.

    `conv` adds the paths of `AdapterTargets.conv` (the ResNet blocks and resamplers of a UNet).
    A part in which nothing matches is a `UserError`: training it would do nothing.
    """

    sites = sites_where(targets, lambda target, path, module: _matches(target, path, conv=conv))
    found = {site.prefix for site in sites}
    for target in targets:
        if target.prefix not in found:
            raise UserError(f"{target.part}: no layer of this model matches the pattern {target.linear.pattern!r}")
    return sites


def sites_where(targets: Sequence[AdapterTargets], wanted: Wanted) -> list[Site]:
    """Every Linear and Conv2d that is wanted, in the order of the model."""
    several = sum(target.part == "text_encoder" for target in targets) > 1
    sites: list[Site] = []
    encoders = 0
    for target in targets:
        section = target.part
        if target.part == "text_encoder" and several:
            encoders += 1
            section = f"text_encoder_{encoders}"
        sites += [
            _site(target, section, path, module)
            for path, module in target.root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and wanted(target, path, module)
        ]
    names = {site.name for site in sites}
    assert len(names) == len(sites), "two layers have the same name in files"
    return sites


def _matches(target: AdapterTargets, path: str, *, conv: bool) -> bool:
    return target.linear.fullmatch(path) is not None or (conv and target.conv.fullmatch(path) is not None)


def find_norms(targets: Sequence[AdapterTargets], *, conv: bool) -> list[Site]:
    """The LayerNorms and GroupNorms that lie in one module with layers that `find_sites` finds, or around them; those
    of a UNet are in its blocks.

    Text encoders are left out: their norms have no names in LyCORIS' files, and ComfyUI reads none of them.
    """
    return [
        _site(target, target.part, path, module)
        for target in targets
        if target.part != "text_encoder"
        for path, module in _norms_around(target, conv=conv)
    ]


def _norms_around(target: AdapterTargets, *, conv: bool) -> list[tuple[str, nn.LayerNorm | nn.GroupNorm]]:
    """Without those that have no weight, and those of the whole model."""
    around: set[str] = set()
    for path, module in target.root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and _matches(target, path, conv=conv):
            while path := path.rpartition(".")[0]:
                around.add(path)
    return [
        (path, module)
        for path, module in target.root.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        and module.weight is not None
        and path.rpartition(".")[0] in around
    ]


def _site(
    target: AdapterTargets, section: str, path: str, module: nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm
) -> Site:
    name = target.name(path)
    block = None if target.blocks is None else target.blocks.number(name)
    layer = None if target.layer is None else target.layer.fullmatch(name)
    depth = block if layer is None else int(layer[1])
    flat, alias = (f"{target.prefix}.{dotted}".replace(".", "_") for dotted in (name, path))
    fused = target.fused(name)
    shared = f"{target.prefix}.{fused}".replace(".", "_") if fused else ""
    place = target.place(name) if fused else 0
    return Site(
        flat, section, target.part, module, name, alias, block, shared, place, prefix=target.prefix, depth=depth
    )


def blocks_of(targets: Iterable[AdapterTargets]) -> Blocks | None:
    """The numbered blocks of the model; None if it has none."""
    return next((target.blocks for target in targets if target.blocks is not None), None)


def in_names_of(sites: Iterable[Site], named: Mapping[str, T]) -> dict[str, T]:
    """By a file's names of layers, or of their tensors, under the names that these layers have in ours: a UNet's block
    may have two names."""
    names = {site.alias: site.name for site in sites if site.part == "unet"}
    renamed = {}
    for key, value in named.items():
        name, dot, rest = key.partition(".")
        renamed[names.get(name, name) + dot + rest] = value
    return renamed
