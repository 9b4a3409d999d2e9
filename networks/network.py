"""What all adapters share: where they sit, how they wrap a layer, parameter groups, saving, loading, merging.

A kind of adapter is one file beside this one: a subclass of `AdapterModule` and a function `create_network`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import UserError
from networks import rates
from networks.weights import LoadReport, by_module, check_loaded, compare, read_weights

if TYPE_CHECKING:
    from library.models.family import AdapterTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """A layer of the base model that an adapter can sit on."""

    name: str  # in files: lora_unet_down_blocks_0_attentions_0_proj_in
    section: str  # "unet", "text_encoder"; with several encoders "text_encoder_1", "text_encoder_2"
    part: str  # "unet" or "text_encoder"
    module: nn.Linear | nn.Conv2d
    path: str = ""  # the same with dots and without the prefix: down_blocks.0.attentions.0.proj_in
    alias: str = ""  # what files in diffusers' or PEFT's naming make of it, where that is another name

    @property
    def spatial(self) -> bool:
        """Whether this is a convolution wider than 1x1: such layers have a rank of their own."""
        return isinstance(self.module, nn.Conv2d) and self.module.kernel_size != (1, 1)


def find_sites(targets: Sequence[AdapterTargets], *, conv: bool) -> list[Site]:
    """Every Linear and Conv2d whose path the targets' patterns match as a whole, in the order of the model.

    `conv` adds the paths of `AdapterTargets.conv` (the ResNet blocks and resamplers of a UNet).
    A part in which nothing matches is a `UserError`: training it would do nothing.
    """
    several = sum(target.part == "text_encoder" for target in targets) > 1
    sites: list[Site] = []
    encoders = 0
    for target in targets:
        section = target.part
        if target.part == "text_encoder" and several:
            encoders += 1
            section = f"text_encoder_{encoders}"
        found = [
            Site(_flat_name(target, name), section, target.part, module, name, _flat_name(target, path))
            for path, module in target.root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and (target.linear.fullmatch(path) or (conv and target.conv.fullmatch(path)))
            and (name := target.name(path))
        ]
        if not found:
            raise UserError(f"{section}: no layer of this model matches the pattern {target.linear.pattern!r}")
        sites += found
    names = {site.name for site in sites}
    assert len(names) == len(sites), "two layers have the same name in files"
    return sites


def _flat_name(target: AdapterTargets, path: str) -> str:
    return f"{target.prefix}.{path}".replace(".", "_")


def in_names_of(sites: Iterable[Site], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that these layers have in ours: a UNet's block may have two names."""
    names = {site.alias: site.name for site in sites if site.part == "unet"}
    renamed = {}
    for key, tensor in tensors.items():
        name, dot, rest = key.partition(".")
        renamed[names.get(name, name) + dot + rest] = tensor
    return renamed


class AdapterModule(nn.Module):
    """One adapter on one layer. A subclass gives `forward`, `delta_weight`, `weight_norm` and `scale_weights`.

    It takes the place of the layer's `forward` and calls the layer's own as `base_forward`. The layer itself is held
    outside of the module tree, so that `state_dict` and `parameters` see the adapter alone.
    `factor`, by which the adapter's output is multiplied, is multiplier * alpha / rank.
    """

    plus_suffix: str | None = None  # LoRA+: parameters whose name ends so get the raised rate
    alpha: Tensor

    def __init__(self, site: Site, *, rank: int, alpha: float | None) -> None:
        """`alpha` None or 0 means `rank`."""
        super().__init__()
        self.site = site
        self.rank = rank
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.multiplier = 1.0
        self.factor = self.scale = float(alpha or rank) / rank
        self.base_forward = site.module.forward
        self.register_load_state_dict_post_hook(_read_scale)

    def attach(self) -> None:
        """Run on every forward of the layer from now on."""
        self.base_forward = self.site.module.forward
        self.site.module.forward = self.forward

    def remove(self) -> None:
        """Give the layer its own forward back."""
        layer = self.site.module
        assert vars(layer).get("forward") == self.forward, f"{self.site.name}: not attached, or something sits on top"
        del layer.forward  # the class's forward shows again …
        if layer.forward != self.base_forward:
            layer.forward = self.base_forward  # … unless another adapter was there before

    def set_multiplier(self, multiplier: float) -> None:
        """1 as trained, 0 exactly the base."""
        self.multiplier = multiplier
        self.factor = multiplier * self.scale

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the layer's weight at multiplier 1, in fp32 and the weight's shape."""
        raise NotImplementedError

    def weight_norm(self) -> Tensor:
        """Frobenius norm of `delta_weight`, a 0-d fp32 tensor."""
        return self.delta_weight().norm()

    @classmethod
    def weight_norms(cls, adapters: Sequence[AdapterModule]) -> list[Tensor]:
        """`weight_norm` of each of these, all of this class; where that pays, a subclass takes many at once."""
        return [adapter.weight_norm() for adapter in adapters]

    def scale_weights(self, ratio: float) -> None:
        """Multiply `delta_weight` by `ratio`, in place."""
        raise NotImplementedError

    def stays_zero(self) -> bool:
        """Whether it is not trained and adds nothing to its layer: it never will. Not known on the meta device."""
        if any(parameter.requires_grad or parameter.is_meta for parameter in self.parameters()):
            return False
        return self.is_zero()

    def is_zero(self) -> bool:
        """Whether `delta_weight` is zero everywhere."""
        return not bool(self.delta_weight().any())


def _read_scale(module: AdapterModule, _: object) -> None:
    """A file's alpha is part of what it does: weights loaded with it act as they did when they were saved."""
    module.scale = (module.alpha.item() or module.rank) / module.rank
    module.set_multiplier(module.multiplier)


class AdapterNetwork(nn.Module):
    """All adapters of a run, with the methods of kohya's network protocol."""

    def __init__(
        self,
        adapters: Iterable[AdapterModule],
        *,
        multiplier: float = 1.0,
        plus_ratios: Mapping[str, float | None] | None = None,
        block_weights: Sequence[float] | None = None,
        pattern_rates: rates.PatternRates = (),
    ) -> None:
        """`plus_ratios`: LoRA+ ratio per part ("unet", "text_encoder"); None or absent trains all at one rate.
        `block_weights`, `pattern_rates`: see networks/rates.py."""
        super().__init__()
        for adapter in adapters:
            self.add_module(adapter.site.name, adapter)
        self.plus_ratios = dict(plus_ratios or {})
        self.block_weights, self.pattern_rates = block_weights, pattern_rates
        self.layer_decay: float | None = None
        self.set_multiplier(multiplier)

    @property
    def adapters(self) -> Iterator[AdapterModule]:
        return iter(self.children())

    def sections(self) -> dict[str, list[AdapterModule]]:
        """The adapters of each section of the model, text encoders first as kohya has them."""
        found: dict[str, list[AdapterModule]] = {}
        for adapter in sorted(self.adapters, key=lambda adapter: adapter.site.part != "text_encoder"):
            found.setdefault(adapter.site.section, []).append(adapter)
        return found

    def module_counts(self) -> dict[str, int]:
        """Adapters per section, to compare with what the architecture should have."""
        return {section: len(adapters) for section, adapters in self.sections().items()}

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """`weight_norm` of every adapter in the order of `adapters`: [n], fp32."""
        adapters = list(self.adapters)
        norms: dict[int, Tensor] = {}
        for kind in dict.fromkeys(type(adapter) for adapter in adapters):
            places = [index for index, adapter in enumerate(adapters) if type(adapter) is kind]
            norms |= zip(places, kind.weight_norms([adapters[index] for index in places]), strict=True)
        return torch.stack([norms[index] for index in range(len(adapters))])

    # -- on the model

    def apply_to(
        self, text_encoder: object, unet: object, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attach to the chosen parts and forget the adapters of the others. The models themselves are known already."""
        chosen = {"text_encoder": apply_text_encoder, "unet": apply_unet}
        for adapter in list(self.adapters):
            if chosen[adapter.site.part]:
                adapter.attach()
            else:
                delattr(self, adapter.site.name)
        if not self.module_counts():
            raise UserError(
                "the adapter sits on no layer: neither the UNet nor a text encoder is trained, or all blocks have "
                "weight 0"
            )
        logger.info("adapted layers: %s", ", ".join(f"{name} {count}" for name, count in self.module_counts().items()))

    def remove(self) -> None:
        """Undo `apply_to`: the base is as it was."""
        for adapter in self.adapters:
            adapter.remove()

    def set_multiplier(self, multiplier: float) -> None:
        """1 as trained, 0 exactly the base."""
        self.multiplier = multiplier
        for adapter in self.adapters:
            adapter.set_multiplier(multiplier)

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: object = None,
        unet: object = None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: object = None,
        device: object = None,
    ) -> None:
        """Add the adapters to the base's weights for good, rounding once. Must not be attached as well.

        The signature is kohya's; only `weights_sd`, loaded first if given, is needed here. The sum is formed in fp32
        where the base's weight lies, and is written in the weight's own dtype.
        """
        if weights_sd is not None:
            self.load_tensors(weights_sd, "the weights to merge")
        for adapter in self.adapters:
            assert "forward" not in vars(adapter.site.module), f"{adapter.site.name}: merging what is attached"
            weight = adapter.site.module.weight
            weight.copy_(weight.float() + adapter.delta_weight().to(weight.device) * adapter.multiplier)

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: object = None) -> tuple[int, float, float]:
        """Shrink each adapter whose norm exceeds the limit. Returns (how many, mean norm, largest norm), norms after.

        Kohya's `scale_weight_norms`. The adapters stay where they lie: `device` is part of the protocol only.
        """
        adapters = list(self.adapters)
        norms: list[float] = self.weight_norms().tolist()  # the host waits for the device once
        over = [(adapter, norm) for adapter, norm in zip(adapters, norms, strict=True) if norm > max_norm_value]
        for adapter, norm in over:
            adapter.scale_weights(max_norm_value / norm)
        norms = [min(norm, max_norm_value) for norm in norms]
        return len(over), sum(norms) / len(norms), max(norms)

    # -- training

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None,
    ) -> list[dict[str, Any]]:
        """One group per section, two with LoRA+: {"params", "lr", "name"}, and "lora_plus_ratio" on the raised ones.
        With `block_weights`, `pattern_rates` or `layer_decay` one (or two) for each rate within the section.

        Each also tells "param_names" and "lora_scale" (alpha / rank), for optimizers that know of LoRA; adapters of
        another scale than the section's usual one form groups of their own.

        A rate of None is `default_lr`. A rate of 0 freezes what it is for: that stays in effect, and is saved as it is
        unless it adds nothing.
        `text_encoder_lr` may be a list with one rate per text encoder; a list of one is for all.
        """
        sections = self.sections()
        encoders = [name for name, adapters in sections.items() if adapters[0].site.part == "text_encoder"]
        of_encoders = dict(zip(encoders, _per_encoder(text_encoder_lr, len(encoders)), strict=True))
        rates.check_patterns(self.pattern_rates, [adapter.site for adapter in self.adapters])
        groups = []
        for section, adapters in sections.items():
            chosen = of_encoders.get(section, unet_lr)
            base = default_lr if chosen is None else chosen
            assert base is not None, f"{section}: no learning rate"
            parts = rates.split(
                section,
                adapters,
                base,
                weights=self.block_weights,
                patterns=self.pattern_rates,
                layer_decay=self.layer_decay,
            )
            for name, (rate, members) in parts.items():
                if rate == 0:
                    rates.freeze(name, members)
                    continue
                groups += _groups(name, members, rate, self.plus_ratios.get(adapters[0].site.part))
        if not groups:
            raise UserError("nothing is trained: every learning rate is 0 (learning_rate, unet_lr, text_encoder_lr)")
        return groups

    # kohya's newer name, by which a module says that it takes a list of rates
    prepare_optimizer_params_with_multiple_te_lrs = prepare_optimizer_params

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        """Nothing to do: what is trained was settled with the learning rates."""

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the base checkpoints its blocks, and the adapters with them."""

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # -- files

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write a file in kohya's names, of `file_tensors`; `dtype` None keeps the dtype that was trained.

        Its ending decides: .safetensors, or else (.ckpt, .pt) a pickled table of tensors, which holds no metadata.
        """
        kept = self.file_tensors()
        tensors = {key: value.to("cpu", dtype or value.dtype).contiguous() for key, value in kept.items()}
        if file.endswith(".safetensors"):
            save_file(tensors, file, dict(metadata) if metadata else None)
        else:
            # clones: a tensor that shares its storage would bring all of it along
            torch.save({key: value.clone() for key, value in tensors.items()}, file)

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds: all adapters but those that are frozen at zero, which would only fill it."""
        zero = {adapter.site.name for adapter in self.adapters if adapter.stays_zero()}
        return {key: tensor for key, tensor in self.state_dict().items() if key.partition(".")[0] not in zero}

    def load_weights(self, file: str) -> LoadReport:
        """Load a file, whatever its naming; see `load_tensors`."""
        return self.load_tensors(read_weights(file, purpose="fits this network"), file)

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> LoadReport:
        """Load tensors in kohya's names, from `source`. `UserError` if none fits or a layer has another shape."""
        report, modules = self.compare_tensors(tensors)
        check_loaded(report, source)
        changed = 0
        for name in report.matched:
            adapter = self.get_submodule(name)
            assert isinstance(adapter, AdapterModule)
            before = adapter.scale
            adapter.load_state_dict(modules[name])
            changed += adapter.scale != before
        if changed:
            logger.warning("%s: alpha differs from the one given in %d modules: the file's is used", source, changed)
        return report

    def compare_tensors(self, tensors: Mapping[str, Tensor]) -> tuple[LoadReport, dict[str, dict[str, Tensor]]]:
        """How tensors in kohya's names fit, and what each adapter's `load_state_dict` takes."""
        modules = by_module(in_names_of((adapter.site for adapter in self.adapters), tensors))
        for adapter in self.adapters:
            own = modules.get(adapter.site.name)
            if own is not None:
                # old files have no alpha: it is the rank; some programs write it as a list of one
                alpha = own.get("alpha", torch.tensor(float(adapter.rank)))
                own["alpha"] = alpha.reshape(()) if alpha.numel() == 1 else alpha
        return compare(self.state_dict(), _flat(modules)), modules


def _flat(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `by_module` took apart."""
    return {f"{name}.{key}": tensor for name, own in modules.items() for key, tensor in own.items()}


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


def _groups(section: str, adapters: list[AdapterModule], rate: float, ratio: float | None) -> list[dict[str, Any]]:
    """The section's parameters by their scale (alpha / rank), and with a LoRA+ `ratio` the raised ones by themselves.

    The most frequent scale has the section's plain name.
    """
    found: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for adapter in adapters:
        for name, parameter in adapter.named_parameters(prefix=adapter.site.name):
            plus = ratio is not None and adapter.plus_suffix is not None and name.endswith(adapter.plus_suffix)
            found.setdefault((adapter.scale, plus), []).append((name, parameter))
    usual = Counter(adapter.scale for adapter in adapters).most_common(1)[0][0]
    groups = []
    for (scale, plus), named in found.items():
        name = section + ("" if scale == usual else f"_scale_{scale:g}") + ("_plus" if plus else "")
        group = {"params": [parameter for _, parameter in named], "lr": rate, "name": name, "lora_scale": scale}
        group["param_names"] = [parameter_name for parameter_name, _ in named]
        if plus and ratio is not None:
            group |= {"lr": rate * ratio, "lora_plus_ratio": ratio}
        groups.append(group)
    return groups
