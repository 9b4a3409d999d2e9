"""The memory of each moment of a run, by part, computed on the outline of the model: no weights are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from library import log
from library.data.captions import as_written
from library.guidance.estimate import parameter_bytes
from library.guidance.passes import Outlined, Weight, bytes_in_formats, held_parts, outlined, weights_in
from library.offload import swap
from library.optimizers.create import create_optimizer, state_bytes
from library.optimizers.small_lora import has_modes
from library.run.base_weights import bytes_apart
from library.run.encode import trains_text
from library.run.network import parameter_groups
from library.run.slider import picture_size

if TYPE_CHECKING:
    from library.config.options import Options
    from library.data.plan import Group
    from library.data.samples import Size
    from library.models.family import ModelFamily
    from library.optimizers.create import OptimizerChoice
    from library.run.plan import Plan

TRAINING = "a training step"


@dataclass(frozen=True)
class Moment:
    """One moment of a run, and the bytes of each part of it that is in memory then."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The moments of a run. `trained`: the number of trained parameters; `state`: bytes of the optimizer's. `host`:
    bytes of the host's memory that spare the device's, by what lies there."""

    moments: tuple[Moment, ...]
    trained: int
    state: int
    host: Mapping[str, int]

    @property
    def largest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def moment(self, name: str) -> Moment:
        return next(moment for moment in self.moments if moment.name == name)


@dataclass(frozen=True)
class _Outline:
    """What the outline of a variant shows without a pass: of each part of the model the bytes of its `weights` by
    format; the weights of the `blocks` that can be swapped; of the `network` all bytes, those of `trained` tensors and
    their `count`; `groups`: how many trained tensors there are of each shape and dtype."""

    weights: Mapping[str, Mapping[str, int]]
    blocks: Sequence[Sequence[Weight]]
    network: int
    trained: int
    count: int
    groups: Mapping[tuple[tuple[int, ...], torch.dtype], int]


@dataclass
class Estimator:
    """Computes the needs of a plan's run under altered options. A pass that was made once is not made again."""

    plan: Plan
    choose: Callable[[Options], OptimizerChoice]  # the optimizer of altered options
    on_gpu: bool
    _outlines: dict[tuple[object, ...], _Outline] = field(default_factory=dict)
    _passes: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)
    _states: dict[tuple[object, ...], int] = field(default_factory=dict)

    def needs(self, options: Options) -> Needs:
        """All moments of a run with these options, which must have a network of our own."""
        outline = self._outline(options)
        state = self._state(outline, options)
        moments = _Moments(self, outline, options, state)
        return Needs(moments=tuple(moments.all()), trained=outline.count, state=state, host=moments.host())

    def floor(self, options: Options) -> int:
        """The bytes of a training step without its activations; no pass is needed."""
        outline = self._outline(options)
        moments = _Moments(self, outline, options, self._state(outline, options))
        return sum(moments.standing.values()) + outline.trained

    def once(self, key: tuple[object, ...], options: Options, work: Callable[[Outlined], int]) -> tuple[int, int]:
        """The result of a pass, and the bytes of host memory that it needed. `key`: its kind, of `_THAT_MATTER`, and
        its sizes."""
        key = (*key, *_THAT_MATTER[key[0]](options))
        if key not in self._passes:
            family, arguments = self.plan.family, self.plan.network_arguments
            with outlined(family, options, arguments, on_gpu=self.on_gpu, caption=self._caption) as outline:
                self._passes[key] = work(outline), outline.on_host
        return self._passes[key]

    @cached_property
    def _caption(self) -> str:
        """The longest caption."""
        samples = self.plan.prepared.samples
        texts = (text for sample in samples for text in as_written(sample.caption, sample.subset))
        return max(texts, key=len, default="")

    def _outline(self, options: Options) -> _Outline:
        precision = options.precision
        key = (
            *(precision.mixed_precision, precision.of_weights, options.model.no_half_vae),
            options.network.network_train_unet_only,
        )
        if key not in self._outlines:
            family = self.plan.family
            with outlined(family, options, self.plan.network_arguments, on_gpu=self.on_gpu, held=False) as outline:
                network = outline.network
                packed = set(family.components.adapted("denoiser").values())
                groups = parameter_groups(network, options)  # freezes what has the rate 0
                trained = [parameter for group in groups for parameter in group["params"]]
                self._outlines[key] = _Outline(
                    weights={name: bytes_in_formats(family, name) for name in family.components.names},
                    blocks=[weights_in(block, packed) for block in family.swap_blocks()],
                    network=parameter_bytes([network]),
                    trained=sum(parameter.nbytes for parameter in trained),
                    count=sum(parameter.numel() for parameter in trained),
                    groups=Counter((tuple(parameter.shape), parameter.dtype) for parameter in trained),
                )
        return self._outlines[key]

    def _state(self, outline: _Outline, options: Options) -> int:
        """Bytes of the optimizer's state: of a real step of one parameter of each shape, times their number."""
        choice = self.choose(options)
        total = 0
        for (shape, dtype), count in outline.groups.items():
            key = (shape, dtype, choice.path, str(choice.arguments))
            if key not in self._states:
                one = nn.Parameter(torch.zeros(shape, dtype=dtype))
                with log.errors_only():
                    group = {"params": [one], "lr": 1e-4, "name": "one"}
                    optimizer = create_optimizer(choice, [group], learning_rate=1e-4)
                    if has_modes(optimizer):
                        optimizer.train()
                    self._states[key] = state_bytes(optimizer)
            total += count * self._states[key]
        return total


def _of_step(options: Options) -> tuple[object, ...]:
    offloaded = options.precision.cpu_offload_checkpointing
    return *_of_prediction(options), *_of_texts(options), *_of_vae(options), offloaded


def _of_prediction(options: Options) -> tuple[object, ...]:
    """Without gradients there are no checkpoints."""
    precision = options.precision
    return precision.mixed_precision, bool(precision.of_weights), bool(precision.unet_format)


def _of_texts(options: Options) -> tuple[object, ...]:
    """Checkpointing puts trained text encoders into training mode."""
    precision = options.precision
    return (
        precision.mixed_precision, bool(precision.of_weights), bool(precision.text_format),
        precision.gradient_checkpointing, options.network.network_train_unet_only,
    )  # fmt: skip


def _of_vae(options: Options) -> tuple[object, ...]:
    return options.precision.mixed_precision, options.model.no_half_vae


_THAT_MATTER: Mapping[object, Callable[[Options], tuple[object, ...]]] = {
    "step": _of_step, "predict": _of_prediction, "texts": _of_texts, "encode": _of_vae, "decode": _of_vae,
}  # fmt: skip
"""The options on which a pass depends, by its kind."""


@dataclass
class _Moments:
    """The moments of one variant. `state`: bytes of the optimizer's."""

    estimator: Estimator
    outline: _Outline
    options: Options
    state: int

    def all(self) -> Iterator[Moment]:
        options, data = self.options, self.options.data
        settings = self.estimator.plan.settings
        if data.cache_latents and not settings:
            yield self._encoding_images()
        if data.cache_text_encoder_outputs:
            yield self._encoding_texts()
        yield self._step()
        if settings:
            yield self._target()
        yield self._optimizers_step()
        if self._measured_groups():
            yield self._validation()
        samples = self.estimator.plan.samples
        if samples is not None:
            usual = self._family.rendering.scale
            sizes = {(item.width, item.height) for item in samples.prompts}
            guided = any((usual if item.scale is None else item.scale) != 1 for item in samples.prompts)
            yield from self._sampling("rendering samples", sizes, guided=guided)
        guided = self._family.rendering.compared != 1
        if options.output.compare_prompts:
            sizes = {self.estimator.plan.datasets[0].resolution}
            yield from self._sampling("rendering --compare_prompts", sizes, guided=guided)
        if options.slider.draws:
            yield from self._sampling("rendering the slider", {picture_size(settings)}, guided=guided)

    @property
    def _family(self) -> ModelFamily:
        return self.estimator.plan.family

    # -- what is always there during training

    @cached_property
    def _frozen(self) -> int:
        """The weights of the parts that stay in memory during training."""
        data, parts = self.options.data, self._family.components
        names = ["denoiser"]
        names += [] if data.cache_text_encoder_outputs else parts.text_encoders
        names += [] if data.cache_latents else ["vae"]
        held = held_parts(self._family, self.options)
        return sum(self.outline.weights[name][held.get(name, "")] for name in names) - round(self._swapping.saved)

    @cached_property
    def _swapping(self) -> swap.Cost:
        precision = self.options.precision
        if precision.blocks_to_swap is None:
            return swap.Cost.of([])
        blocks = swap.chosen(self.outline.blocks, precision.blocks_to_swap)
        sizes = [sum(weight.bytes_in(precision.unet_format) for weight in block) for block in blocks]
        return swap.Cost.of(sizes)

    def host(self) -> dict[str, int]:
        """Bytes in host memory that spare the device's."""
        found = {"swapped blocks": round(self._swapping.host), "checkpoints": self._forward_and_backward()[1]}
        return {name: size for name, size in found.items() if size}

    @cached_property
    def standing(self) -> dict[str, int]:
        """Weights, adapter, optimizer state and average, which do not change from moment to moment."""
        standing = {"weights": self._frozen, "adapter": self.outline.network, "optimizer state": self.state}
        if apart := bytes_apart(self.options, self._family):
            standing["training adapter"] = apart
        if self.options.ema.ema_decay is not None:
            standing["average"] = self.outline.trained
        if self.options.forgetting.ewc_data:
            standing["Fisher information"] = 2 * self.outline.trained  # and the weights at the start
        subsets = (subset for dataset in self.estimator.plan.datasets for subset in dataset.subsets)
        if self.options.forgetting.distillation_weight or any(subset.prior == "previous" for subset in subsets):
            standing["network before"] = self.outline.network
        if self.options.guidance.find_lr:
            standing["copy for the finder"] = self.outline.network + self.state
        return standing

    def _step(self) -> Moment:
        """Of the largest batch."""
        size, count = _largest(self._groups())
        peak, _ = self._forward_and_backward()
        if not self.options.data.cache_latents:  # gone before the denoiser runs
            peak = max(peak, self._once(("encode", size, count), lambda outline: outline.encode_images(size, count)))
        if not (trains_text(self.options) or self.options.data.cache_text_encoder_outputs):
            peak = max(peak, self._once(("texts", count), lambda outline: outline.encode_texts(count)))
        activations = max(peak - self.outline.trained, 0)
        return Moment(TRAINING, {**self.standing, "gradients": self.outline.trained, "activations": activations})

    def _forward_and_backward(self) -> tuple[int, int]:
        """Bytes on the device, beside what is always there, and in host memory."""
        size, count = _largest(self._groups())
        return self.estimator.once(("step", size, count), self.options, lambda outline: outline.step(size, count))

    def _target(self) -> Moment:
        """Of a slider: the base's predictions for three prompts in one pass, without gradients."""
        size, count = _largest(self._groups())
        peak = self._once(("predict", size, 3 * count), lambda outline: outline.predict(size, 3 * count))
        return Moment("the slider's target", {**self.standing, "activations": peak})

    def _optimizers_step(self) -> Moment:
        """torch's optimizers compute all updates at once (foreach), in one more copy of the trained weights."""
        parts = {**self.standing, "gradients": self.outline.trained, "updates": self.outline.trained}
        return Moment("the optimizer's step", parts)

    def _groups(self) -> list[Group]:
        """The buckets, with the altered batch size."""
        plan, wanted = self.estimator.plan, self.options.data.train_batch_size
        if wanted == plan.options.data.train_batch_size:
            return plan.prepared.groups
        return [replace(group, batch_size=wanted) for group in plan.prepared.groups]

    # -- other moments

    def _encoding_images(self) -> Moment:
        """Before anything else is loaded."""
        sizes = {group.size for group in self.estimator.plan.prepared.groups}
        size, count = max(sizes, key=lambda size: size[0] * size[1]), self.options.data.vae_batch_size
        peak = self._once(("encode", size, count), lambda outline: outline.encode_images(size, count))
        return Moment("caching latents", {"weights": self.outline.weights["vae"][""], "activations": peak})

    def _encoding_texts(self) -> Moment:
        data, parts = self.options.data, self._family.components
        count = data.text_encoder_batch_size or data.train_batch_size
        peak = self._once(("texts", count), lambda outline: outline.encode_texts(count))
        held = self.options.precision.encoding_format
        weights = sum(self.outline.weights[name][held] for name in parts.text_encoders)
        weights += 0 if data.cache_latents else self.outline.weights["vae"][""]
        return Moment("caching text", {"weights": weights, "activations": peak})

    def _measured_groups(self) -> list[Group]:
        """The buckets of the images that are held out, and of further sets that are measured."""
        plan = self.estimator.plan
        sets = [plan.prepared.validation, plan.prepared.trained, *(one.prepared for one in plan.sets)]
        return [group for one in sets if one is not None for group in one.groups]

    def _validation(self) -> Moment:
        size, count = _largest(self._measured_groups())
        peak = self._once(("predict", size, count), lambda outline: outline.predict(size, count))
        return Moment("validation", {**self.standing, **self._average_in_use("validate"), "activations": peak})

    def _sampling(self, name: str, sizes: Collection[Size], *, guided: bool) -> Iterator[Moment]:
        """The denoiser, twice at once with guidance, and then the VAE, which is loaded for it."""
        standing = {**self.standing, **self._average_in_use("sample")}
        if self.options.data.cache_latents:
            standing["VAE"] = self.outline.weights["vae"][""]
        size = max(sizes, key=lambda size: size[0] * size[1])
        size = tuple(side - side % self._family.size_divisor for side in size)  # type: ignore[assignment]
        count = 2 if guided else 1
        peak = self._once(("predict", size, count), lambda outline: outline.predict(size, count))
        yield Moment(name, {**standing, "activations": peak})
        peak = self._once(("decode", size), lambda outline: outline.decode_images(size))
        yield Moment(f"{name}: the VAE", {**standing, "activations": peak})

    def _average_in_use(self, purpose: str) -> dict[str, int]:
        """The copy of the weights while the average replaces them."""
        ema = self.options.ema
        return (
            {"copy of the adapter": self.outline.trained}
            if ema.ema_decay is not None and purpose in ema.purposes
            else {}
        )

    def _once(self, key: tuple[object, ...], work: Callable[[Outlined], int]) -> int:
        peak, _ = self.estimator.once(key, self.options, work)
        return peak


def _largest(groups: Sequence[Group]) -> tuple[Size, int]:
    """The size and the number of images of the batch with the most pixels."""
    found = {(group.size, group.largest_batch) for group in groups}
    return max(found, key=lambda item: (item[0][0] * item[0][1] * item[1], item))
