"""The space that a VAE encodes images to and decodes them from. Every image goes through `LatentSpace`, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from library.gpu import to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor


AutoEncoder: TypeAlias = Any
"""An AutoencoderKL of diffusers, which has no types."""


@dataclass(frozen=True)
class LatentSpace:
    """Latents of `channels`, each cell `factor` pixels wide, shifted and scaled for the network.

    overflows_fp16: whether the VAE's own configuration says that fp16 is too small for its activations.
    """

    channels: int
    factor: int
    scaling: float
    shift: float = 0.0
    overflows_fp16: bool = False

    def encode(self, vae: AutoEncoder, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [B, C, h, w] in float32, scaled; pixels in [-1, 1].

        Computed in the precision that the VAE was loaded in, even under autocast.
        """
        import torch

        weight = next(vae.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            pixels = to_device(pixels_BCHW, weight.device).to(weight.dtype)
            latents = vae.encode(self._as_the_vae_has_it(pixels)).latent_dist
        mean_BCHW, std_BCHW = (self._as_images(moment).float() for moment in (latents.mean, latents.std))
        return self._scaled(vae, mean_BCHW, std_BCHW)

    def decode(self, vae: AutoEncoder, latents_BCHW: Tensor) -> Tensor:
        """The pixels of scaled latents, [B, 3, H, W] in about [-1, 1]; in the precision that the VAE was loaded in."""
        import torch

        weight = next(vae.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            latents = self._as_they_were(vae, latents_BCHW.to(weight.device), weight.dtype)
            return self._as_images(vae.decode(self._as_the_vae_has_it(latents), return_dict=False)[0])

    def _scaled(self, vae: AutoEncoder, mean_BCHW: Tensor, std_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return (mean_BCHW - self.shift) * self.scaling, std_BCHW * self.scaling

    def _as_they_were(self, vae: AutoEncoder, latents_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back, in the dtype that the VAE computes in."""
        return latents_BCHW.to(dtype) / self.scaling + self.shift

    def _as_the_vae_has_it(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW

    def _as_images(self, found: Tensor) -> Tensor:
        return found


@dataclass(frozen=True, kw_only=True)
class FrameLatentSpace(LatentSpace):
    """Latents of a VAE for video, which takes and returns images as videos of one frame, [B, C, 1, h, w]. Each channel
    has a mean and a standard deviation of its own, by which it is normalised; `scaling` and `shift` have no effect.

    An image's latents are the middle of their distribution, whose deviation is 0 here: what such models are given
    elsewhere (diffusers' pipelines of Anima, Qwen-Image and Cosmos 2.5, kohya's script for Anima).
    """

    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def _scaled(self, vae: AutoEncoder, mean_BCHW: Tensor, std_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        means, deviations = self._tables(mean_BCHW)
        return (mean_BCHW - means) / deviations, std_BCHW.new_zeros(std_BCHW.shape)

    def _as_they_were(self, vae: AutoEncoder, latents_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        means, deviations = self._tables(latents_BCHW)
        return (latents_BCHW * deviations + means).to(dtype)

    def _as_the_vae_has_it(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW[:, :, None]

    def _as_images(self, found: Tensor) -> Tensor:
        return found[:, :, 0]

    def _tables(self, like_BCHW: Tensor) -> list[Tensor]:
        """Means and deviations, each [1, C, 1, 1]."""
        return [like_BCHW.new_tensor(table).view(1, -1, 1, 1) for table in (self.means, self.deviations)]


@dataclass(frozen=True, kw_only=True)
class PatchLatentSpace(LatentSpace):
    """Latents of FLUX.2: `patch`² cells of its autoencoder are one, in the order channel, row, column. `channels` and
    `factor` are those of such a patch. Each channel is normalised by a mean and a variance that lie with the
    autoencoder's weights, as `bn`; `scaling` and `shift` have no effect. eps: is added to the variance.

    An image's latents are the middle of their distribution, whose deviation is 0 here: what the makers' own code,
    diffusers' pipelines and musubi-tuner give the model.
    """

    patch: int = 2
    eps: float = 1e-4

    def _scaled(self, vae: AutoEncoder, mean_BCHW: Tensor, std_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import pixel_unshuffle

        means, deviations = self._tables(vae)
        mean_BCHW = (pixel_unshuffle(mean_BCHW, self.patch) - means) / deviations
        return mean_BCHW, mean_BCHW.new_zeros(mean_BCHW.shape)

    def _as_they_were(self, vae: AutoEncoder, latents_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        from torch.nn.functional import pixel_shuffle

        means, deviations = self._tables(vae)
        return pixel_shuffle(latents_BCHW * deviations + means, self.patch).to(dtype)

    def _tables(self, vae: AutoEncoder) -> list[Tensor]:
        """Means and deviations, each [1, C, 1, 1] in float32."""
        mean, variance = (vae.bn[name].float().view(1, -1, 1, 1) for name in ("running_mean", "running_var"))
        return [mean, (variance + self.eps).sqrt()]
