"""What the rest of the project asks of a model family, and nothing else of how the family does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.diffusion.process import Process


@dataclass(frozen=True)
class AdapterTargets:
    """The modules of one part that adapters attach to, by their paths below `root`.

    part: "unet" or "text_encoder". prefix: what keys in adapter files begin with. linear: paths of the Linear and 1 × 1
    convolution targets. conv: paths of those that come in addition where convolutions are adapted. name: from a path to
    the dotted name that keys use (dots become underscores).
    """

    part: str
    prefix: str
    root: nn.Module
    linear: re.Pattern[str]
    conv: re.Pattern[str]
    name: Callable[[str], str]


class ModelFamily(Protocol):
    """A base model. Opening it reads headers and configurations; weights come with the load methods, frozen."""

    name: str  # as in FAMILIES
    path: str  # as the user gave it
    vae_path: str | None  # as the user gave it with --vae
    base_model_version: str  # kohya's ss_base_model_version: "sd_v1", "sd_v2", …
    architecture: str  # modelspec.architecture, without "/lora"
    implementation: str  # modelspec.implementation: whose names the adapters' keys follow
    clip_skip: int | None  # as kohya counts: 1 is the text encoder's last layer
    vae_factor: int  # pixels a latent cell spans
    vae_overflows_fp16: bool  # the VAE must not compute in fp16, or it gives NaN
    latent_channels: int
    native_resolution: int  # pixels
    token_limit: int  # tokens of a caption that are read: 75, 150 or 225

    vae: nn.Module | None
    text_encoders: list[nn.Module]
    unet: nn.Module | None

    @property
    def process(self) -> Process:
        """How noise is mixed in, and what the network is to predict then."""
        ...

    def outlined(self) -> AbstractContextManager[None]:
        """A context in which UNet and text encoders are there without their weights, on the meta device, so that
        adapters and files can be held against them. UserError where a part's weights do not fit its configuration."""
        ...

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> None: ...

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device | str) -> None: ...

    def load_unet(self, dtype: torch.dtype, device: torch.device | str) -> None: ...

    def release_vae(self) -> None: ...

    def release_text_encoders(self) -> None: ...

    def encode_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [B, C, h, w] in float32, scaled; pixels in [-1, 1]."""
        ...

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """The pixels of latents that are scaled as those of `encode_images`, [B, 3, H, W] in about [-1, 1]."""
        ...

    def vae_fingerprint(self) -> str:
        """A hash of all that `encode_images` depends on but the precision; reads the VAE's weights once."""
        ...

    def text_fingerprint(self) -> str:
        """A hash of all that `encode_prompts` depends on but the precision; reads the text encoders' weights once."""
        ...

    def count_tokens(self, caption: str) -> int:
        """How many tokens the caption has, without BOS and EOS."""
        ...

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders give, each [B, …]. Differentiable."""
        ...

    def condition(
        self,
        texts: Mapping[str, Tensor],
        *,
        original_sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """What `predict` is conditioned on, each [B, …]: `texts` as of `encode_prompts`, and what more the family asks.

        Sizes are (width, height) in pixels: of each image as it is on disk, and of what is seen of all of them. crops:
        (left, top) of that in the image after resizing, and mirroring if it is seen so.
        """
        ...

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's answer for noisy latents at noise levels of `process`, of the same shape."""
        ...

    def adapter_targets(self) -> list[AdapterTargets]:
        """For each part that is loaded."""
        ...

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        """How many targets each part has in the sizes that are known, with those of `conv` or without; else None.

        Parts are called as in `networks.network.Site.section`.
        """
        ...

    def third_party_text_encoders(self) -> Any:
        """What a network module of kohya's protocol is given as `text_encoder`: a module, or a list of them."""
        ...

    def third_party_unet(self) -> Any:
        """What such a module is given as `unet`."""
        ...

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pipeline's own names for two prompts, each as of `encode_prompts`."""
        ...

    def sampling_pipeline(self) -> Any:
        """A diffusers pipeline over the loaded parts."""
        ...
