"""The network of a run: what the trainer asks of it, and our own, which is made of adapters.

Other packages' networks are in `networks.foreign`. Nothing outside of this folder asks which of the two a network is:
where one cannot do something, the protocol has a value or a sentence for it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.checkpoints.adapter_file import WrittenNaming
from networks import rates
from networks.adapter import Adapter, Capability
from networks.files import AdapterFile
from networks.formats.fused import fuse, split
from networks.formats.naming import in_names_of as in_other_names
from networks.load_report import LoadReport, by_module, check_loaded, compare
from networks.settings import LearningRates
from networks.sites import in_names_of

if TYPE_CHECKING:
    from library.optimizers.custom_adamw.pairs import Role

logger = logging.getLogger(__name__)

Group = dict[str, Any]  # of parameters, as torch's optimizers take it: its values have many types


class TrainedWord(Protocol):
    """A trained embedding (`networks.embeddings`) as the record and the files of a run need it. `word`: its new word.
    `vectors`: how many that has. `widths`: the numbers of a vector, by its name in files."""

    word: str

    @property
    def vectors(self) -> int: ...
    def widths(self) -> dict[str, int]: ...
    def tensors(self) -> Mapping[str, Tensor]: ...
    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None: ...


class TrainableNetwork(nn.Module, ABC):
    """The interface of every network that the trainer trains.

    Its `state_dict` and `load_state_dict` are its part of a run's state; `tensors` are those that its file holds.
    """

    @property
    def embedding(self) -> TrainedWord | None:
        """The trained embedding in it; None: it has none."""
        return None

    @abstractmethod
    def attach(self, parts: Collection[str]) -> None:
        """Act on these parts of the model from now on: "unet", "text_encoder". The others get no adapters."""

    @abstractmethod
    def before_training(self, *, gradient_checkpointing: bool) -> None:
        """Once, when the weights are loaded and the network is on its device."""

    @abstractmethod
    def groups(self, learning_rates: LearningRates) -> list[Group]:
        """The trained parameters in groups, each with "params" (a list), "lr" and a "name" that no other group has.
        `UserError` if nothing is trained, or the rates do not fit the network."""

    @abstractmethod
    def start_epoch(self) -> None:
        """Before the first batch of each epoch."""

    @abstractmethod
    def before_batch(self) -> None:
        """Before each batch that is trained on."""

    @abstractmethod
    def at_noise(self, share_B: Tensor) -> None:
        """Before the forward of each batch that is trained on. share_B: its noise levels as shares of the highest, in
        [0, 1], on the CPU."""

    @abstractmethod
    def penalty(self) -> Tensor | None:
        """A term that the network adds to the training loss, 0-d; None: it adds none."""

    @abstractmethod
    def after_step(self, done: int, total: int) -> None:
        """After optimizer step `done` of `total`, with the gradients still there."""

    @abstractmethod
    def at(self, multiplier: float) -> AbstractContextManager[None]:
        """A context in which its effect is `multiplier` times the trained one. `UserError` if `refuses("off")`."""

    def off(self) -> AbstractContextManager[None]:
        """A context in which the base runs alone. `UserError` if `refuses("off")`."""
        return self.at(0.0)

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of its file, in the dtypes that are trained: as far as they are known before it is written."""

    @abstractmethod
    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write its file; `dtype` None keeps the dtypes that are trained. The ending of the name is the format:
        .safetensors, or else (.ckpt, .pt) a pickled table of tensors, which holds no metadata."""

    @abstractmethod
    def load(self, file: AdapterFile) -> LoadReport:
        """Load a file into the attached network. `UserError` if nothing fits or a layer has other shapes; layers that
        are missing on either side are warned of."""

    @abstractmethod
    def layers(self) -> list[str]:
        """The adapted layers by their names in files, in the order of `norms`; empty where `norms` is None."""

    @abstractmethod
    def norms(self) -> Tensor | None:
        """Frobenius norm of each layer's difference to the base's weight, [layers], fp32; None: not known."""

    @abstractmethod
    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        """Shrink each layer whose norm exceeds the limit: kohya's `scale_weight_norms`. Returns (how many, mean norm,
        largest norm), norms after."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Adapted layers per section of the model, text encoders first; empty: not known."""

    @abstractmethod
    def layer_counts(self) -> dict[str, dict[str, int]]:
        """The same by the last words of the layers' names ("attn1.to_q"), for the sections of `counts`."""

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Trained numbers per section, for the sections of `counts`."""

    @abstractmethod
    def ranks(self) -> tuple[int, int] | None:
        """The lowest and the highest rank of its adapters, 0 for kinds without one; None: not known."""

    @abstractmethod
    def refuses(self, capability: Capability) -> str | None:
        """Why it cannot be switched off, its norms cannot be limited, or it cannot be trained where each process has a
        share of the gradients (ZeRO-2); None if it can."""


class Network(TrainableNetwork):
    """A network of our own: adapters of one kind or of several, each on a layer of the base."""

    def __init__(
        self,
        adapters: Iterable[Adapter],
        *,
        multiplier: float = 1.0,
        plus_ratios: Mapping[str, float | None] | None = None,
        block_weights: Sequence[float] | None = None,
        pattern_rates: rates.PatternRates = (),
        sized_by_file: bool = False,
    ) -> None:
        """`plus_ratios`: LoRA+ ratio per part ("unet", "text_encoder"); None or absent trains all at one rate.
        `block_weights`, `pattern_rates`: see networks/rates.py. `sized_by_file`: ranks and forms are those of a file.
        """
        super().__init__()
        for adapter in adapters:
            self.add_module(adapter.site.name, adapter)
        self._by_class = _by_class(self.adapters)
        for kind, members in self._by_class.items():
            kind.joined(members)
        self.plus_ratios = dict(plus_ratios or {})
        self.sized_by_file = sized_by_file
        self.block_weights, self.pattern_rates = block_weights, pattern_rates
        self.naming: WrittenNaming = "kohya"  # of the tensors in its files: --save_naming
        self.set_multiplier(multiplier)

    @property
    def adapters(self) -> Iterator[Adapter]:
        for child in self.children():
            assert isinstance(child, Adapter)
            yield child

    def sections(self) -> dict[str, list[Adapter]]:
        """The adapters of each section of the model, text encoders first as kohya has them."""
        found: dict[str, list[Adapter]] = {}
        for adapter in sorted(self.adapters, key=lambda adapter: adapter.site.part != "text_encoder"):
            found.setdefault(adapter.site.section, []).append(adapter)
        return found

    def counts(self) -> dict[str, int]:
        return {section: len(adapters) for section, adapters in self.sections().items()}

    def layer_counts(self) -> dict[str, dict[str, int]]:
        return {
            section: dict(Counter(adapter.site.short for adapter in adapters))
            for section, adapters in self.sections().items()
        }

    def layers(self) -> list[str]:
        return [adapter.site.name for adapter in self.adapters]

    def parameter_counts(self) -> dict[str, int]:
        return {
            section: sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
            for section, adapters in self.sections().items()
        }

    def ranks(self) -> tuple[int, int]:
        ranks = [adapter.rank for adapter in self.adapters if adapter.rank] or [0]
        return min(ranks), max(ranks)

    def refuses(self, capability: Capability) -> str | None:
        return next(filter(None, (adapter.refuses(capability) for adapter in self.adapters)), None)

    # -- on the model

    def attach(self, parts: Collection[str] = ("unet", "text_encoder")) -> None:
        for adapter in list(self.adapters):
            if adapter.site.part in parts:
                adapter.attach()
            else:
                delattr(self, adapter.site.name)
        self._by_class = _by_class(self.adapters)
        if not self.counts():
            raise UserError(
                "the adapter sits on no layer: neither the UNet nor a text encoder is trained, or all blocks have "
                "weight 0"
            )
        logger.info("adapted layers: %s", ", ".join(f"{name} {count}" for name, count in self.counts().items()))

    def detach(self) -> None:
        """Undo `attach`: the base is as it was."""
        for adapter in self.adapters:
            adapter.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """1 as trained, 0 exactly the base."""
        self.multiplier = multiplier
        for adapter in self.adapters:
            adapter.set_multiplier(multiplier)

    @contextmanager
    def at(self, multiplier: float) -> Iterator[None]:
        before = self.multiplier
        self.set_multiplier(multiplier)
        try:
            yield
        finally:
            self.set_multiplier(before)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapters into the base's weights for good, rounding once. Must not be attached as well.

        The sum is formed in fp32 where the base's weight lies, and is written in the weight's own dtype.
        """
        for adapter in self.adapters:
            assert "forward" not in vars(adapter.site.module), f"{adapter.site.name}: merging what is attached"
            for leaf, weight in adapter.site.module.named_parameters():
                weight.copy_(adapter.merged(leaf, adapter.tensors(), weight))

    # -- training

    def before_training(self, *, gradient_checkpointing: bool) -> None:
        """The base checkpoints its blocks, and the adapters with them."""
        for adapter in self.adapters:
            adapter.before_training()

    def start_epoch(self) -> None:
        self.train()

    def before_batch(self) -> None:
        for adapter in self.adapters:
            adapter.before_batch()

    def at_noise(self, share_B: Tensor) -> None:
        for kind, adapters in self._by_class.items():
            kind.at_noise(adapters, share_B)

    def penalty(self) -> Tensor | None:
        found = [kind.penalty(adapters) for kind, adapters in self._by_class.items()]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def after_step(self, done: int, total: int) -> None:
        for kind, adapters in self._by_class.items():
            kind.after_step(adapters, done, total)

    @torch.no_grad()
    def norms(self) -> Tensor:
        norms: dict[Adapter, Tensor] = {}
        for kind, adapters in self._by_class.items():
            norms |= zip(adapters, kind.norms(adapters), strict=True)
        return torch.stack([norms[adapter] for adapter in self.adapters])

    @torch.no_grad()
    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        adapters = list(self.adapters)
        norms: list[float] = self.norms().tolist()  # the host waits for the device once
        over = [(adapter, norm) for adapter, norm in zip(adapters, norms, strict=True) if norm > limit]
        for adapter, norm in over:
            adapter.shrink(limit / norm)
        norms = [min(norm, limit) for norm in norms]
        return len(over), sum(norms) / len(norms), max(norms)

    def groups(self, learning_rates: LearningRates) -> list[Group]:
        """One group per section, two with LoRA+: {"params", "lr", "name"}, and "lora_plus_ratio" on the raised ones.
        With `block_weights`, `pattern_rates` or a layer decay one (or two) for each rate within the section.

        Each has "param_names", "lora_scale" (alpha / rank), "roles" and "partners" as well, for optimizers that know of
        LoRA; adapters of another scale than the section's usual one form groups of their own.

        A rate of 0 freezes its parameters: they stay in effect, and are saved as they are unless they add nothing.
        """
        sections = self.sections()
        encoders = [name for name, adapters in sections.items() if adapters[0].site.part == "text_encoder"]
        of_encoders = dict(zip(encoders, _per_encoder(learning_rates.text_encoder, len(encoders)), strict=True))
        rates.check_patterns(self.pattern_rates, [adapter.site for adapter in self.adapters])
        groups = []
        for section, adapters in sections.items():
            chosen = of_encoders.get(section, learning_rates.unet)
            base = learning_rates.default if chosen is None else chosen
            assert base is not None, f"{section}: no learning rate"
            parts = rates.split(
                section,
                adapters,
                base,
                weights=self.block_weights,
                patterns=self.pattern_rates,
                layer_decay=learning_rates.layer_decay,
            )
            for name, (rate, members) in parts.items():
                if rate == 0:
                    rates.freeze(name, members)
                    continue
                groups += _groups(name, members, rate, self.plus_ratios.get(adapters[0].site.part))
        if not groups:
            raise UserError("nothing is trained: every learning rate is 0 (learning_rate, unet_lr, text_encoder_lr)")
        return groups

    # -- files

    def tensors(self) -> dict[str, Tensor]:
        """All adapters but those that are frozen at zero, which would only fill the file."""
        tensors = {
            f"{adapter.site.name}.{end}": tensor
            for adapter in self.adapters
            if not adapter.stays_zero()
            for end, tensor in adapter.export().items()
        }
        return fuse(tensors, (adapter.site for adapter in self.adapters))

    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """In the names of `naming`."""
        named, more = in_other_names(self.tensors(), self.naming, source=f"--save_naming {self.naming}")
        tensors = {key: _in_file(key, value.cpu(), dtype).contiguous() for key, value in named.items()}
        metadata = {**metadata, **more} if metadata else more
        if str(file).endswith(".safetensors"):
            save_file(tensors, file, dict(metadata) if metadata else None)
        else:
            # clones: a tensor that shares its storage would bring all of it along
            torch.save({key: value.clone() for key, value in tensors.items()}, file)

    def load(self, file: AdapterFile) -> LoadReport:
        report, modules = self.compare(file)
        check_loaded(report, file.source, sized_by_file=self.sized_by_file)
        changed = 0
        for name in report.matched:
            adapter = self.get_submodule(name)
            assert isinstance(adapter, Adapter)
            before = _alpha(adapter)
            adapter.load_state_dict(modules[name])
            changed += _alpha(adapter) != before
        if changed:
            logger.warning(
                "%s: alpha differs from the one given in %d modules: the file's is used", file.source, changed
            )
        return report

    def compare(self, file: AdapterFile) -> tuple[LoadReport, dict[str, dict[str, Tensor]]]:
        """How a file's layers fit, and what each adapter's `load_state_dict` takes."""
        sites = [adapter.site for adapter in self.adapters]
        modules = by_module(in_names_of(sites, split(file.tensors, sites)))
        for adapter in self.adapters:
            own = modules.get(adapter.site.name)
            if own is not None:
                modules[adapter.site.name] = adapter.completed(own)
        flat = {f"{name}.{key}": tensor for name, own in modules.items() for key, tensor in own.items()}
        return compare(self.state_dict(), flat), modules


def _in_file(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the type of the file, but for an alpha that it would round: that scales a whole layer."""
    cast = value.to(dtype) if dtype and value.is_floating_point() else value
    return value if key.endswith(".alpha") and not torch.equal(cast.to(value.dtype), value) else cast


def _alpha(adapter: Adapter) -> float | None:
    alpha = dict(adapter.named_buffers()).get("alpha")
    return None if alpha is None else alpha.item()


def _by_class(adapters: Iterable[Adapter]) -> dict[type[Adapter], list[Adapter]]:
    """The adapters of each class, in their order."""
    found: dict[type[Adapter], list[Adapter]] = {}
    for adapter in adapters:
        found.setdefault(type(adapter), []).append(adapter)
    return found


def _per_encoder(rate: float | Sequence[float] | None, count: int) -> Sequence[float | None]:
    """One rate for each of `count` text encoders."""
    if rate is None or isinstance(rate, int | float):
        return [rate] * count
    if not rate:
        return [None] * count
    if len(rate) == 1:
        return [rate[0]] * count
    if count and len(rate) != count:
        raise UserError(f"--text_encoder_lr: {len(rate)} rates for {count} text encoder{'s' * (count > 1)}")
    return list(rate)[:count]


class _Member(NamedTuple):
    """Of a group of parameters. role, partner: see `library.optimizers.custom_adamw.pairs.Halves`."""

    name: str
    parameter: nn.Parameter
    role: Role
    partner: nn.Parameter | None


def _groups(section: str, adapters: list[Adapter], rate: float, ratio: float | None) -> list[Group]:
    """The section's parameters by their scale (alpha / rank), and with a LoRA+ `ratio` the raised ones by themselves.

    The most frequent scale has the section's plain name.
    """
    found: dict[tuple[float, bool], list[_Member]] = {}
    for adapter in adapters:
        partners = {up: adapter.get_parameter(down) for down, up in adapter.pairs()}
        for name, parameter in adapter.named_parameters():
            role = adapter.ROLES.get(name, "")
            plus = ratio is not None and adapter.raises(name)
            member = _Member(f"{adapter.site.name}.{name}", parameter, role, partners.get(name))
            found.setdefault((adapter.scale, plus), []).append(member)
    usual = Counter(adapter.scale for adapter in adapters).most_common(1)[0][0]
    groups = []
    for (scale, plus), members in found.items():
        name = section + ("" if scale == usual else f"_scale_{scale:g}") + ("_plus" if plus else "")
        names, parameters, roles, halves = map(list, zip(*members, strict=True))
        group: Group = {"params": parameters, "lr": rate, "name": name, "lora_scale": scale}
        group |= {"param_names": names, "roles": roles, "partners": halves}
        if plus and ratio is not None:
            group |= {"lr": rate * ratio, "lora_plus_ratio": ratio}
        groups.append(group)
    return groups
