"""Our own networks, of whatever kind: new ones, and those that take their layers and sizes from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from library.config.registry import Arguments
from library.errors import UserError
from library.progress import progress
from networks import kinds, rates
from networks.adapter import Adapter
from networks.files import AdapterFile
from networks.formats.fused import split
from networks.layers import PRESETS, choose, in_blocks, in_section, of_preset, preset_of
from networks.network import Network
from networks.settings import Asked, LayerSizes, PlusSettings, RateSettings
from networks.sites import Site, blocks_of, find_norms, find_sites, in_names_of

if TYPE_CHECKING:
    from library.models.family import AdapterTargets

logger = logging.getLogger(__name__)

NOTHING: Arguments = {}
_OF_WIDE_KERNELS = ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas", "use_tucker")


def make(
    kind: str,
    targets: Sequence[AdapterTargets],
    asked: Asked,
    arguments: Arguments,
    *,
    file: AdapterFile | None,
) -> Network:
    """`create`, or `create_from_file` where the sizes are a file's."""
    if file is None:
        return create(kind, targets, asked, arguments)
    return create_from_file(kind, file, targets, asked, arguments)


def create(
    kind: str,
    targets: Sequence[AdapterTargets],
    asked: Asked,
    arguments: Arguments = NOTHING,
    *,
    multiplier: float = 1.0,
) -> Network:
    """A network of new adapters of a kind of KINDS; the models are known from `targets`.

    `arguments`: `--network_args`, fields of the kind's `Sizes` and `Settings`. Raises UserError.
    """
    adapter = kinds.load(kind)
    sizes = adapter.SIZES(**kinds.fields_of(adapter.SIZES, arguments))
    settings = adapter.SETTINGS(**kinds.fields_of(adapter.SETTINGS, arguments))
    blocks = blocks_of(targets)
    preset = preset_of(sizes.preset)
    sites = adapter.sites(targets, asked, sizes) if preset is None else adapter.sites_in(targets, preset)
    norm = kinds.load("norm")
    norms = _norms_beside(sites, targets) if sizes.train_norm and adapter is not norm else []
    weights = rates.block_weights(settings, blocks)
    within = in_blocks(in_section([*sites, *norms], sizes.train_blocks, blocks), sizes.train_block_indices, blocks)
    chosen = choose(within, sizes)
    left, beside = rates.without_zero_blocks(chosen, weights), {site.name for site in norms}
    made: list[Adapter | None] = []
    with progress(left, desc="initial weights", unit="layer", delay=2.0) as bar:  # seconds before it shows
        for site in bar:
            if site.name in beside:
                made.append(norm.new(site, Asked(seed=asked.seed), LayerSizes(), RateSettings(), blocks))
            else:
                made.append(adapter.new(site, asked, sizes, settings, blocks))
    adapters = [one for one in made if one is not None]
    _warn_without_wide_kernels(adapters, sizes)
    return _network(adapters, settings, weights, multiplier=multiplier)


def _warn_without_wide_kernels(adapters: Sequence[Adapter], sizes: LayerSizes) -> None:
    """Of arguments about convolutions wider than 1 x 1, where none is adapted: GUIs write them beside any preset."""
    given = [name for name, value in vars(sizes).items() if name in _OF_WIDE_KERNELS and value]
    if given and not any(adapter.site.spatial for adapter in adapters):
        logger.warning(
            "--network_args: without effect, as no convolution wider than 1 x 1 is adapted: %s",
            ", ".join(given),
        )


def _norms_beside(sites: Sequence[Site], targets: Sequence[AdapterTargets]) -> list[Site]:
    """The normalisation layers of the blocks that these layers lie in."""
    usual = {site.name for site in find_sites(targets, conv=False)}
    every = {site.name for site in find_sites(targets, conv=True)}
    return find_norms(targets, conv=any(site.name in every - usual for site in sites))


def create_from_file(
    kind: str,
    file: AdapterFile,
    targets: Sequence[AdapterTargets],
    asked: Asked,
    arguments: Arguments = NOTHING,
    *,
    multiplier: float = 1.0,
) -> Network:
    """A network with the layers, ranks and alphas of a file, whose tensors are not loaded yet.

    `arguments`: fields of the kind's `Settings`; blocks with weight 0 stay in the network, untrained. Raises UserError.
    """
    adapter = kinds.load(kind)
    settings = adapter.SETTINGS(**kinds.fields_of(adapter.SETTINGS, arguments))
    readers = {"norm": kinds.load("norm"), **dict.fromkeys(adapter.reads(), adapter)}
    if not any(layer.kind in adapter.reads() for layer in file.layers.values()):
        raise UserError(f"{file.source}: holds no {adapter.NOUN}; the first tensor is {next(iter(file.tensors), '')!r}")
    made = _as_in_file(readers, file, targets, {adapter: (asked, settings)})
    weights = rates.block_weights(settings, blocks_of(targets))
    return _network(made, settings, weights, multiplier=multiplier, sized_by_file=True)


def create_to_merge(file: AdapterFile, targets: Sequence[AdapterTargets], *, multiplier: float) -> Network:
    """A network with the layers of a file, of whatever kinds of ours they are."""
    return Network(_as_in_file(kinds.readers(), file, targets, {}), multiplier=multiplier)


def _as_in_file(
    classes: Mapping[str, type[Adapter]],
    file: AdapterFile,
    targets: Sequence[AdapterTargets],
    wanted: Mapping[type[Adapter], tuple[Asked, RateSettings]],
) -> list[Adapter]:
    """An adapter for each layer of the model that the file has, of one of these kinds.

    `wanted`: how the kinds are trained that the user chose.
    """
    sites = [*of_preset(targets, PRESETS["full"]), *find_norms(targets, conv=True)]
    if any(site.fused for site in sites):
        file = AdapterFile.of(split(file.tensors, sites), file.source)
    layers = {name: layer for name, layer in file.layers.items() if layer.kind in classes}
    names = in_names_of(sites, layers)
    adapters = [
        reader.as_in_file(site, layer.tensors, *wanted.get(reader, (Asked(), reader.SETTINGS())))
        for site in sites
        if (layer := names.get(site.name)) is not None
        and isinstance(site.module, (reader := classes[layer.kind]).LAYERS)
    ]
    if not adapters:
        raise UserError(
            f"{file.source}: none of its {len(names)} modules, such as {next(iter(names))}, is in this model"
        )
    return adapters


def _network(
    adapters: Sequence[Adapter],
    settings: RateSettings,
    weights: Sequence[float] | None,
    *,
    multiplier: float,
    sized_by_file: bool = False,
) -> Network:
    ratios = settings.by_part.values() if isinstance(settings, PlusSettings) else ()
    if any(ratios) and not any(one.raises(name) for one in adapters for name, _ in one.named_parameters()):
        raise UserError(f"loraplus_lr_ratio: has no effect: {adapters[0].NOUN} has no tensor whose rate LoRA+ raises")
    for adapter in adapters:
        adapter.module_dropout = settings.left_out
    return Network(
        adapters,
        multiplier=multiplier,
        plus_ratios=settings.by_part if isinstance(settings, PlusSettings) else None,
        block_weights=weights,
        pattern_rates=rates.pattern_rates(settings.network_reg_lrs),
        sized_by_file=sized_by_file,
    )
