"""Loads the parts of a model one after the other, and encodes images and captions for the caches on the way."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from library.config.options import Options
from library.data.caches.disk import Disk, Team
from library.data.dataset import TrainingData
from library.models.checkpoints.weights import Change
from library.models.family import ModelFamily
from library.offload import swap
from library.offload.checkpoints import OffloadedCheckpoints
from library.offload.lane import Lane, lane_of
from library.out_of_memory import during
from library.quantization.frozen import Held, compute_frozen
from library.sampling import render as sample
from library.units import human_bytes
from networks.merge import BaseWeights

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def vae_dtype(family: ModelFamily, options: Options) -> torch.dtype:
    """The dtype that the VAE computes in."""
    dtype = DTYPES[options.precision.mixed_precision]
    return dtype_of_vae(family, dtype, no_half_vae=options.model.no_half_vae)


def dtype_of_vae(family: ModelFamily, dtype: torch.dtype, *, no_half_vae: bool) -> torch.dtype:
    """The dtype that the VAE computes in where the other parts compute in `dtype`."""
    if no_half_vae or (dtype == torch.float16 and family.latents.overflows_fp16):
        return torch.float32
    return dtype


def latents_on_disk(family: ModelFamily, options: Options, accelerator: Accelerator) -> Disk | None:
    """The cache of --cache_latents_to_disk; None without that option, and for a slider."""
    if not options.data.cache_latents_to_disk or options.slider.is_trained:
        return None
    encoder = f"VAE {family.vae_fingerprint()} in {_precision(vae_dtype(family, options), options)}"
    return _disk(encoder, options, accelerator)


def texts_on_disk(
    family: ModelFamily, base_weights: BaseWeights, options: Options, accelerator: Accelerator
) -> Disk | None:
    """The cache of --cache_text_encoder_outputs_to_disk; None without that option, and for a slider."""
    if not options.data.cache_text_encoder_outputs_to_disk or options.slider.is_trained:
        return None
    dtype = DTYPES[options.precision.mixed_precision]
    encoders = f"text encoders {family.text_fingerprint()}{base_weights.fingerprint()} in {_precision(dtype, options)}"
    held = f", held in {options.precision.encoding_format}" if options.precision.encoding_format else ""
    return _disk(f"{encoders}{held}", options, accelerator)


def _precision(dtype: torch.dtype, options: Options) -> str:
    return f"{dtype} with TF32" if options.precision.allow_tf32 and dtype == torch.float32 else f"{dtype}"


def _disk(encoder: str, options: Options, accelerator: Accelerator) -> Disk:
    return Disk(
        encoder=encoder,
        folder=Path(options.data.cache_dir).expanduser() if options.data.cache_dir else None,
        trust=options.data.skip_cache_check,
        team=Team(accelerator.process_index, accelerator.num_processes, gather_object),
    )


def load_and_encode(
    family: ModelFamily,
    data: TrainingData,
    options: Options,
    accelerator: Accelerator,
    base_weights: BaseWeights,
    prompts: sample.EncodedPrompts,
    *,
    measured: Sequence[TrainingData],
    cache: bool,
) -> None:
    """Load VAE, text encoders and denoiser one after the other, each released before the next if its output is cached.

    The latents of what is `measured` are cached in any case: they never change. Without `cache` nothing is encoded, and
    everything stays loaded: a dry run looks at all parts.
    """
    dtype = DTYPES[options.precision.mixed_precision]
    if dtype != torch.float32 and not options.model.no_half_vae and vae_dtype(family, options) == torch.float32:
        logger.warning("the VAE of %s computes in fp32, because fp16 is too small for it (--no_half_vae)", family.path)
    parts = _Parts(family, options, accelerator, base_weights)
    if cache and options.data.cache_latents:
        disk, batch_size = latents_on_disk(family, options, accelerator), options.data.vae_batch_size
        for one in (data, *measured):
            beside = [other for other in (data, *measured) if other is not one]
            one.cache_latents(parts.encode_images, batch_size=batch_size, disk=disk, beside=beside)
        parts.release("vae")
    else:
        parts.load_vae()
        for one in measured if cache else ():
            one.cache_latents(parts.encode_images, batch_size=options.data.vae_batch_size)

    if cache and options.data.cache_text_encoder_outputs:
        batch_size = options.data.text_encoder_batch_size or options.data.train_batch_size
        disk = texts_on_disk(family, base_weights, options, accelerator)
        if options.network.base_weights:  # matched to the layers even if all captions are on disk
            with family.outlined():
                base_weights.changes(family.adapter_targets(*family.components.text_encoders))
        for one in (data, *measured):
            beside = [other for other in (data, *measured) if other is not one]
            one.cache_captions(parts.encode_prompts, batch_size=batch_size, disk=disk, beside=beside)
        prompts.keep(parts.encode_prompts)
        parts.release(*family.components.text_encoders)
    else:
        parts.load_text_encoders(_held(options.precision.text_format, options.precision.text_format_option))
    parts.load_denoiser()


@dataclass(frozen=True)
class _Parts:
    """Loads and releases the parts of a model, in the precision of the options and with the base weights merged."""

    family: ModelFamily
    options: Options
    accelerator: Accelerator
    base_weights: BaseWeights

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.options.precision.mixed_precision]

    def load_vae(self) -> None:
        dtype = vae_dtype(self.family, self.options)
        self.family.components.load("vae", dtype, self.accelerator.device)

    def load_text_encoders(self, held: Held | None = None) -> None:
        for name in self.family.components.text_encoders:
            self._load(name, held)

    def load_denoiser(self) -> None:
        """Load the denoiser, ready to train."""
        precision, lane = self.options.precision, lane_of(self.accelerator.device)
        if lane is None:
            _warn_of_idle_offloading(self.options)

        blocks: list[swap.Block] = []

        def apart() -> list[nn.Module]:
            """The swapped layers, which the outline has already."""
            if lane is not None and precision.blocks_to_swap is not None:
                blocks.extend(swap.chosen(self.family.swap_blocks(), precision.blocks_to_swap))
            return [layer for block in blocks for layer in block]

        held = _held(precision.unet_format, precision.unet_format_option)
        denoiser = self._load("denoiser", held, apart=apart)
        self.base_weights.report()
        freeze_convolutions(denoiser)
        if lane is not None and blocks:
            self._swap(blocks, lane)
        offloaded = OffloadedCheckpoints(lane) if lane is not None and precision.cpu_offload_checkpointing else None
        into_training(self.family, self.options, by=offloaded)

    def _load(self, name: str, held: Held | None, *, apart: Callable[[], Iterable[nn.Module]] = tuple) -> nn.Module:
        def merged() -> dict[tuple[nn.Module, str], Change]:
            return self.base_weights.changes(self.family.adapter_targets(name))

        device = self.accelerator.device
        return self.family.components.load(name, self.dtype, device, held=held, merged=merged, apart=apart)

    def _swap(self, blocks: Sequence[swap.Block], lane: Lane) -> None:
        swap.Ring(blocks, lane)
        cost, count = swap.swapping_cost(blocks), len(self.family.swap_blocks())
        logger.info(
            "swapped: %d of the %s's %d blocks, %s, are in host memory; two buffers on the GPU have %s",
            *(len(blocks), self.family.PARTS["denoiser"].title, count, human_bytes(cost.host)),
            human_bytes(cost.buffers),
        )

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ModelFamily.encode_images`; loads the VAE for the first image, as all of them may be on disk."""
        if "vae" not in self.family.components:
            self.load_vae()
        with during(f"encoding {len(pixels)} images with the VAE"):
            return self.family.encode_images(pixels)

    def encode_prompts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """As `ModelFamily.encode_prompts`; loads the text encoders for the first caption."""
        if not self.family.components.have_text_encoders:
            precision = self.options.precision
            self.load_text_encoders(_held(precision.encoding_format, precision.text_format_option))
        with during(f"encoding {len(captions)} captions with the text encoders"):
            return self.family.encode_prompts(captions)

    def release(self, *names: str) -> None:
        """Release parts, and their memory to the device."""
        self.family.components.release(*names)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _held(format: str, option: str) -> Held | None:
    return Held(format, f"--{option}") if format else None


def _warn_of_idle_offloading(options: Options) -> None:
    for name in ("blocks_to_swap", "cpu_offload_checkpointing"):
        if getattr(options.precision, name):
            logger.warning("--%s: has no effect here: the device's memory is the host's already", name)


def freeze_convolutions(denoiser: nn.Module) -> None:
    """Have the convolutions keep no input, which torch's own do for the gradient of their weight."""
    for layer in denoiser.modules():
        if isinstance(layer, nn.Conv2d):
            compute_frozen(layer)


def into_training(family: ModelFamily, options: Options, *, by: Callable[..., object] | None = None) -> None:
    """Put the denoiser into training mode, with checkpoints if they are asked for, then of trained text encoders too.

    Checkpointing is active in training mode only; nothing else in the denoiser differs between the modes. `by`: see
    `Components.checkpoint`.
    """
    parts = family.components
    parts["denoiser"].train()
    if not options.precision.gradient_checkpointing:
        return
    parts.checkpoint("denoiser", by=by)
    if trains_text(options):
        for name in parts.text_encoders:
            parts.checkpoint(name)
            parts[name].train()


def trains_text(options: Options) -> bool:
    """Whether gradients flow through the text encoders: to adapters in them, or to an embedding."""
    return options.embedding.is_trained or not options.network.network_train_unet_only
