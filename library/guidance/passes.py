"""Passes over a base model without weights: the memory of activations under given options."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library import log, rng
from library.diffusion.process import predict_and_target
from library.guidance.autocast import gpu_autocast
from library.guidance.estimate import parameter_bytes, peak_of
from library.offload.checkpoints import OffloadedCheckpoints
from library.offload.lane import OutlineLane
from library.quantization import BYTES
from library.quantization.frozen import compute_frozen
from library.run.encode import DTYPES, freeze_convolutions, into_training, trains_text, vae_dtype
from library.run.network import asked_of, files_of, make_embedding, parts_of
from library.run.objective import make_objective
from networks import create, kinds
from networks.embeddings.together import WithEmbedding

if TYPE_CHECKING:
    from library.config.options import Options
    from library.config.registry import Arguments
    from library.data.samples import Size
    from library.models.family import ModelFamily
    from networks.network import TrainableNetwork

Fake = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outlined:
    """The parts of a model and the network on them, on the meta device, ready for passes. `on_gpu`: the run's are.
    `offloaded`: what keeps checkpoints in host memory, if they are kept there. `caption`: the text that is encoded: of
    some families the states are as many as its tokens."""

    family: ModelFamily
    options: Options
    network: TrainableNetwork
    on_gpu: bool
    offloaded: OffloadedCheckpoints | None = None
    caption: str = ""

    @property
    def on_host(self) -> int:
        """Bytes of host memory that the passes so far needed for checkpoints."""
        return 0 if self.offloaded is None else self.offloaded.outlines.host

    def autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES[self.options.precision.mixed_precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def _peak(self, work: Callable[[Fake], object]) -> int:
        with gpu_autocast() if self.on_gpu else nullcontext():
            return peak_of(work, self.parts)

    @property
    def parts(self) -> list[nn.Module]:
        return [*self.family.components.loaded(), self.network]

    def texts(self, count: int) -> dict[str, Tensor]:
        """The states of `count` captions, as a cache has them."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

        def work(fake: Fake) -> None:
            with torch.no_grad():
                for name, value in self.family.encode_prompts([self.caption]).items():
                    shapes[name] = (tuple(value.shape[1:]), value.dtype)

        self._peak(work)
        return {name: torch.zeros(count, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

    def latents(self, size: Size, count: int) -> Tensor:
        width, height = (side // self.family.latents.factor for side in size)
        return torch.zeros(count, self.family.latents.channels, height, width)

    # -- the moments of a run

    def step(self, size: Size, count: int) -> int:
        """Activations and gradients of the forward and backward pass of a batch of `count` images, whose latents are
        there, and whose texts are if the text encoders are not trained."""
        objective, trains = make_objective(self.options.objective, self.family), trains_text(self.options)
        cached = None if trains else self.texts(count)
        latents = self.latents(size, count)

        def work(fake: Fake) -> None:
            with self.autocast():
                mean = fake(latents)
                condition = self._condition(fake, cached, size, count)
                level = fake(objective.process.at(torch.zeros(count, dtype=torch.long)))
                seen = predict_and_target(objective.process, self.family.predict, mean, mean, level, condition)
                loss = objective.main.unweighted(seen, None).mean()
            loss.backward()

        try:
            return self._peak(work)
        finally:
            self.network.zero_grad(set_to_none=True)

    def predict(self, size: Size, count: int) -> int:
        """One forward pass without gradients, as in validation and sampling."""
        process = self.family.process
        cached, latents = self.texts(count), self.latents(size, count)

        def work(fake: Fake) -> None:
            with self.autocast(), torch.no_grad():
                condition = self._condition(fake, cached, size, count)
                level = fake(process.at(torch.zeros(count, dtype=torch.long)))
                self.family.predict(fake(latents), level, condition)

        with rng.without_dropout(self.network):
            return self._peak(work)

    def encode_images(self, size: Size, count: int) -> int:
        return self._peak(lambda fake: self.family.encode_images(fake(_pixels(size, count))))

    def decode_images(self, size: Size) -> int:
        def work(fake: Fake) -> None:
            with torch.no_grad():
                self.family.decode_latents(fake(self.latents(size, 1)))

        return self._peak(work)

    def encode_texts(self, count: int) -> int:
        def work(fake: Fake) -> None:
            with torch.no_grad():
                self.family.encode_prompts([self.caption] * count)

        return self._peak(work)

    def _condition(self, fake: Fake, cached: Mapping[str, Tensor] | None, size: Size, count: int) -> dict[str, Tensor]:
        if cached is not None:
            texts = {name: fake(value) for name, value in cached.items()}
        else:
            texts = self.family.encode_prompts([self.caption] * count)
        return self.family.condition(texts, original_sizes=[size] * count, crops=[(0, 0)] * count, target_size=size)


def _pixels(size: Size, count: int) -> Tensor:
    width, height = size
    return torch.zeros(count, 3, height, width)


@contextmanager
def outlined(
    family: ModelFamily, options: Options, arguments: Arguments, *, on_gpu: bool, held: bool = True, caption: str = ""
) -> Iterator[Outlined]:
    """The model and the network of these options without weights, in the dtypes and formats of a run.

    `options`: with a network of our own. `arguments`: --network_args. `on_gpu`: autocast is a GPU's. `held` False: no
    weight is packed. `caption`: see `Outlined`.
    """
    parts, precision = family.components, options.precision
    with family.outlined(), log.errors_only():
        for module in parts.loaded():
            module.eval().requires_grad_(False)
        for name in parts.names:
            parts[name].to(vae_dtype(family, options) if name == "vae" else DTYPES[precision.mixed_precision])
        for name in held_parts(family, options) if held else ():
            hold(family, name)
        freeze_convolutions(parts["denoiser"])
        network = _network(family, options, arguments)
        if precision.of_weights:
            network.to(dtype=DTYPES[precision.mixed_precision])
        network.train()
        offloaded = OffloadedCheckpoints(OutlineLane()) if precision.cpu_offload_checkpointing else None
        into_training(family, options, by=offloaded)
        network.before_training(gradient_checkpointing=precision.gradient_checkpointing)
        yield Outlined(family, options, network, on_gpu, offloaded, caption)


def _network(family: ModelFamily, options: Options, arguments: Arguments) -> TrainableNetwork:
    """The network of these options on the outline, attached."""
    embedding = make_embedding(options, family)
    if embedding is not None:
        embedding.attach()
        if options.embedding.train_embedding_only:
            return embedding
    kind = kinds.kind_of(options.network.network_module, options.network.network_args)
    assert kind is not None, "networks of other packages cannot be made without weights"
    _, sizes = files_of(options)
    network = create.make(kind, family.adapter_targets(), asked_of(options), arguments, file=sizes)
    network.attach(parts_of(options))
    return network if embedding is None else WithEmbedding(network, embedding, bundle=False)


# -- formats of frozen weights


def held_parts(family: ModelFamily, options: Options) -> dict[str, str]:
    """The format of each part of the model whose frozen weights are packed."""
    precision = options.precision
    formats = {"denoiser": precision.unet_format} | dict.fromkeys(
        family.components.text_encoders, precision.text_format
    )
    return {name: format for name, format in formats.items() if format}


def hold(family: ModelFamily, name: str) -> None:
    """Give these layers of an outline weights of 8 bits, which are decoded where they are used."""
    for layer in family.components.adapted(name).values():
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        compute_frozen(layer)


@dataclass(frozen=True)
class Weight:
    """A weight of a part: its numbers, output channels and bytes, and whether it is one of those that are packed."""

    numbers: int
    rows: int
    nbytes: int
    is_packed: bool

    def bytes_in(self, format: str) -> float:
        """Bytes in one of quantization.FORMATS; "" is as computed with."""
        return BYTES[format](self.numbers, self.rows) if format and self.is_packed else self.nbytes


def weights_in(layers: Iterable[nn.Module], packed: Container[nn.Module]) -> list[Weight]:
    """The weights of these layers of an outline where none is packed. `packed`: the layers that would be."""
    return [
        Weight(layer.weight.numel(), layer.weight.shape[0], layer.weight.nbytes, layer in packed)
        for layer in layers
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def bytes_in_formats(family: ModelFamily, name: str) -> dict[str, int]:
    """Bytes of a part of an outline where nothing is packed, by the format that its layers would be held in."""
    whole = parameter_bytes([family.components[name]])
    packed = set(family.components.adapted(name).values())
    weights = weights_in(packed, packed)
    own = sum(weight.nbytes for weight in weights)
    return {format: round(whole - own + sum(weight.bytes_in(format) for weight in weights)) for format in ("", *BYTES)}
