"""Adding the deltas of adapter files to a base model for good (kohya's `--base_weights`)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.base_weights import with_multipliers
from networks.create import create_to_merge
from networks.files import AdapterFile, read
from networks.load_report import check_loaded, some_names

if TYPE_CHECKING:
    from library.models.checkpoints.weights import Change
    from library.models.family import AdapterTargets
    from networks.network import Network

logger = logging.getLogger(__name__)

PURPOSE = "is merged into the base"  # see networks.files.check


@dataclass
class _File:
    name: str
    multiplier: float
    content: AdapterFile
    merged: set[str] = field(default_factory=set)  # names of layers

    def part(self, prefixes: tuple[str, ...]) -> AdapterFile:
        """The layers whose names begin with one of these."""
        return replace(self.content.beginning_with(*prefixes), source=f"--base_weights {self.name}")


class BaseWeights:
    """Adapter files to be merged into the parts of a base model, into each as soon as it is loaded."""

    def __init__(self, files: Sequence[str], multipliers: Sequence[float]) -> None:
        """Read the files. A file without a multiplier has 1. `UserError` for one that holds other kinds than ours."""
        try:
            self._files = [
                _File(name, factor, read(name, purpose=PURPOSE))
                for name, factor in with_multipliers(files, multipliers)
            ]
        except UserError as error:
            raise UserError(f"--base_weights {error}") from None

    def fingerprint(self) -> str:
        """A text that identifies these files' effect, for the names of caches; empty without files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(repr(file.multiplier).encode())
            for key, tensor in sorted(file.content.tensors.items()):
                digest.update(f"{key} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest() if self._files else ""

    def check(self, targets: Sequence[AdapterTargets]) -> None:
        """`UserError` for a file that does not fit these layers, of all parts, which may be on the meta device."""
        prefixes = tuple(f"{target.prefix}_" for target in targets)
        for file in self._files:
            part = file.part(prefixes)
            if not part.layers:
                raise _nothing_fits(file, sorted(file.content.layers))
            network = create_to_merge(part, targets, multiplier=file.multiplier)
            if other := network.compare(part)[0].mismatched:
                raise UserError(f"{part.source}: {len(other)} layers are not those of this model:{some_names(other)}")

    @torch.no_grad()
    def changes(self, targets: Sequence[AdapterTargets]) -> dict[tuple[nn.Module, str], Change]:
        """What becomes of the weights of these parts, which may be on the meta device: by a layer that a file names and
        the name of its parameter, a function from the weight to that with multiplier * delta in it.

        In the order of the files; sums are formed in fp32 and rounded to the weight's dtype once for each file.
        """
        found: dict[tuple[nn.Module, str], Change] = {}
        prefixes = tuple(f"{target.prefix}_" for target in targets)
        for file in self._files:
            part = file.part(prefixes)
            if not part.layers:
                continue
            network = create_to_merge(part, targets, multiplier=file.multiplier)
            report, layers = network.compare(part)
            check_loaded(report, part.source, sized_by_file=True)
            for adapter in network.adapters:
                tensors = _contents(layers[adapter.site.name])
                for leaf, _ in adapter.site.module.named_parameters():
                    change, place = partial(adapter.merged, leaf, tensors), (adapter.site.module, leaf)
                    found[place] = partial(_both, found[place], change) if place in found else change
                adapted = adapter.site.name, adapter.site.alias, adapter.site.fused
                file.merged.update(part.layers.keys() & set(adapted))
        return found

    def refuse_others(self, targets: Sequence[AdapterTargets]) -> None:
        """`UserError` for layers of other parts than these."""
        prefixes = tuple(f"{target.prefix}_" for target in targets)
        for file in self._files:
            if others := [name for name in file.content.layers if not name.startswith(prefixes)]:
                raise UserError(
                    f"--base_weights {file.name}: adapts other parts than the denoiser as well, which cannot be "
                    f"switched off in pictures:{some_names(others)}"
                )

    def networks(self, targets: Sequence[AdapterTargets]) -> list[Network]:
        """Each file as a network on these loaded layers, not attached yet, instead of in their weights."""
        found = []
        for file in self._files:
            part = file.part(tuple(f"{target.prefix}_" for target in targets))
            network = create_to_merge(part, targets, multiplier=file.multiplier)
            network.load(part)
            found.append(network)
        return found

    def report(self) -> None:
        """Say what went into the base. To be called when every part is loaded. `UserError` if nothing of a file did."""
        for file in self._files:
            modules = file.content.layers.keys()
            left = sorted(modules - file.merged)
            if not file.merged:
                raise _nothing_fits(file, left)
            logger.info(
                "merged into the base: %s, %d of %d modules, times %g",
                *(file.name, len(file.merged), len(modules), file.multiplier),
            )
            if left:
                logger.warning("%s: %d modules are not in this model:%s", file.name, len(left), some_names(left))


def _contents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, without those that an adapter on an outline has of its own: they are as in a new one."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if not tensor.is_meta
    }


def _both(first: Change, second: Change, weight: Tensor) -> Tensor:
    return second(first(weight))


def _nothing_fits(file: _File, modules: Sequence[str]) -> UserError:
    return UserError(f"--base_weights {file.name}: none of its modules is in this model:{some_names(modules)}")
