"""What Stable Diffusion 1.x, 2.x and XL have in common: loading, the latents, what is predicted, the schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.gpu import to_device
from library.models.checkpoints.base_model import ZERO_TERMINAL, BaseModel, Part
from library.models.family import AdapterTargets

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.diffusion.ddpm import DDPM

logger = logging.getLogger(__name__)

TOKEN_LIMITS = (75, 150, 225)
SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # of all versions, where not stated

# The layers that adapters attach to, by their paths in diffusers' UNet and transformers' CLIPTextModel
_BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
UNET_LINEAR = re.compile(
    rf"{_BLOCK}\.attentions\.\d+\."
    r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
)
UNET_CONV = re.compile(
    rf"{_BLOCK}\.(?:resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)|(?:down|up)samplers\.\d+\.conv)"
)
TEXT_LINEAR = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
NOTHING = re.compile(r"(?!)")


def load_part(
    source: Part,
    new: Callable[[Mapping[str, Any]], nn.Module],
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    """The part's module, filled, frozen and in evaluation mode."""
    from library.models.checkpoints.weights import fill

    module = new(source.config)
    fill(module, source.entries(), dtype=dtype, device=device, where=source.where)
    return module.to(device).eval()  # `to` for buffers: the parameters are there


def outline(source: Part, new: Callable[[Mapping[str, Any]], nn.Module]) -> nn.Module:
    """The part's module without its weights, which are only held against the table of the file. Raises UserError."""
    from library.models.checkpoints.weights import check_fit

    try:
        module = new(source.config)
    except Exception as error:  # diffusers and transformers refuse configurations in all ways that there are
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source.where}: no model can be made of this configuration: {reason}") from error
    check_fit(module, source.entries(), source.where)
    return module


@dataclass(frozen=True)
class LatentSpace:
    """What a VAE encodes to: latents of `channels`, each cell `factor` pixels wide, shifted and scaled for the UNet.

    overflows_fp16: whether the VAE's own configuration says that fp16 is too small for its activations.
    """

    channels: int
    factor: int
    scaling: float
    shift: float
    overflows_fp16: bool

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [B, C, h, w] in float32, scaled; pixels in [-1, 1].

        Computed in the precision that the VAE was loaded in, whatever autocast is in force around it.
        """
        import torch

        weight = next(vae.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            latents = vae.encode(to_device(pixels_BCHW, weight.device).to(weight.dtype)).latent_dist
        return (latents.mean.float() - self.shift) * self.scaling, latents.std.float() * self.scaling

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """The pixels of scaled latents, [B, 3, H, W] in about [-1, 1]; in the precision that the VAE was loaded in."""
        import torch

        weight = next(vae.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            latents = latents_BCHW.to(weight.device, weight.dtype) / self.scaling + self.shift
            return vae.decode(latents, return_dict=False)[0]


def with_scaling(base: BaseModel, *, default: float) -> BaseModel:
    """`base` with the family's `default` where the VAE's configuration is older than its field scaling_factor.

    diffusers would take Stable Diffusion 1's then, whatever the model.
    """
    part = base.parts.get("vae")
    if part is None or part.config.get("scaling_factor"):
        return base
    scaled = replace(part, config={**part.config, "scaling_factor": default})
    return replace(base, parts={**base.parts, "vae": scaled})


def latent_space(base: BaseModel) -> LatentSpace:
    """From the VAE's configuration, which must fit the UNet's and name the scale (see `with_scaling`)."""
    if "vae" not in base.parts:
        raise UserError(f"{base.path} holds no VAE; give one with --vae")
    config, unet = base.parts["vae"].config, base.parts["unet"].config
    inputs, latents = unet.get("in_channels", 4), config.get("latent_channels", 4)
    if inputs != latents:
        hint = "an inpainting model, which is not supported" if inputs == 9 else "another kind of model, or another VAE"
        raise UserError(f"{base.path}: the UNet takes {inputs} channels and the VAE gives {latents}: {hint}")
    if config.get("latents_mean") or config.get("latents_std"):
        raise UserError(
            f"{base.parts['vae'].where}: scales each channel by itself (latents_mean, latents_std), as no Stable "
            "Diffusion 1.x, 2.x or XL model that is supported does"
        )
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{base.parts['vae'].where}: its {name} is {value!r}, which is no number")
    return LatentSpace(
        channels=int(latents),
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scaling=float(scale),
        shift=float(shift),
        overflows_fp16=bool(config.get("force_upcast", False)),
    )


def native_resolution(base: BaseModel, factor: int, *, default: int) -> int:
    """Pixels of a side, from the UNet's configuration; `default`: in cells, where that says nothing."""
    size = base.parts["unet"].config.get("sample_size") or default
    return int(size if isinstance(size, int) else size[0]) * factor


def token_limit(max_token_length: int | None) -> int:
    """75, 150 or 225. UserError for anything else."""
    limit = max_token_length or TOKEN_LIMITS[0]
    if limit not in TOKEN_LIMITS:
        raise UserError(f"max_token_length {max_token_length}: must be one of {', '.join(map(str, TOKEN_LIMITS))}")
    return limit


def prediction_type(base: BaseModel, *, says_v: bool) -> str:
    """What the network predicts: v if the user says so, else as the model says itself, else noise.

    Weights do not show it, and configurations are often wrong in converted folders: the flag goes before them.
    """
    if says_v:
        if base.prediction == "epsilon":
            logger.warning(
                "--v_parameterization was given, but %s predicts noise, says %s; going by the flag",
                *(base.path, base.prediction_from),
            )
        return "v_prediction"
    if base.prediction == "v_prediction":
        logger.info("%s predicts velocity, says %s", base.path, base.prediction_from)
    return base.prediction or "epsilon"


def scheduler(base: BaseModel, prediction: str, *, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler's configuration, for training and drawing alike; rescaled if that is wanted."""
    config = dict(base.scheduler)
    if not zero_terminal_snr:
        if base.location.is_file() and prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
            logger.warning(
                "%s: it says nothing of v, and noise as the target does not go with such a schedule: the usual one is "
                "used; if it predicts v, give --v_parameterization",
                base.path,
            )
            return {name: value for name, value in config.items() if name not in ZERO_TERMINAL}
        return config
    if prediction == "epsilon":
        raise UserError(
            f"--zero_terminal_snr: {base.path} predicts noise, which at a last timestep of pure noise says nothing "
            "about the image; it is for models that predict v (--v_parameterization)"
        )
    return config | ZERO_TERMINAL


def check_counts(targets: Mapping[str, AdapterTargets], expected: Mapping[str, int] | None, *, conv: bool) -> None:
    """A rename in diffusers or transformers must not silently train fewer modules. Both by the same names of parts."""
    for name, target in targets.items():
        paths = [path for path, _ in target.root.named_modules()]
        count = sum(bool(target.linear.fullmatch(p) or (conv and target.conv.fullmatch(p))) for p in paths)
        known = expected[name] if expected else count
        assert count == known, f"{count} targets in {name}, where this architecture has {known}"


class LatentDiffusion:
    """The members of `library.models.family.ModelFamily` that are the same for all of them.

    A family adds its text encoders, what its UNet is conditioned on, where adapters sit, and how it draws.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None,
        predicts: str,
        default_scaling: float,
        default_cells: int,
        max_token_length: int | None,
        zero_terminal_snr: bool,
        weighted_captions: bool,
    ) -> None:
        """`base` has the VAE of `vae` already. `predicts`: "epsilon" or "v_prediction". default_scaling, default_cells:
        of the latents and of a side, where configurations are older than these fields. Raises UserError."""
        self._base = base = with_scaling(base, default=default_scaling)
        self.path, self.vae_path = base.path, vae
        self.prediction_type = predicts
        self._scheduler = scheduler(base, predicts, zero_terminal_snr=zero_terminal_snr)
        self._latents = latent_space(base)
        self.latent_channels, self.vae_factor = self._latents.channels, self._latents.factor
        self.vae_overflows_fp16 = self._latents.overflows_fp16
        self.native_resolution = native_resolution(base, self.vae_factor, default=default_cells)
        self.token_limit = token_limit(max_token_length)
        self.weighted_captions = weighted_captions

        self.vae: nn.Module | None = None
        self.text_encoders: list[nn.Module] = []
        self.unet: nn.Module | None = None

    @cached_property
    def process(self) -> DDPM:
        """DDPM with the noise schedule of the model's scheduler."""
        from library.diffusion.ddpm import DDPM
        from library.diffusion.noise_schedule import alphas_cumprod

        table = alphas_cumprod(self._scheduler, where=f"the scheduler of {self.path}")
        return DDPM(self.prediction_type, table, SCHEDULER | self._scheduler)

    @cached_property
    def _tokenizer(self) -> Any:
        from library.models.modules import read_tokenizer

        return read_tokenizer(self._base.tokenizer, self._base.tokenizer_options)

    def _encoders(self) -> list[tuple[Part, Callable[[Mapping[str, Any]], nn.Module]]]:
        """The text encoders, and what makes a module of each."""
        raise NotImplementedError

    @contextmanager
    def outlined(self) -> Iterator[None]:
        from library.models.modules import new_unet, new_vae

        outline(self._base.parts["vae"], new_vae)
        self.unet = outline(self._base.parts["unet"], new_unet)
        self.text_encoders = [outline(part, new) for part, new in self._encoders()]
        try:
            yield
        finally:
            self.unet, self.text_encoders = None, []

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.text_encoders = [load_part(part, new, dtype, device) for part, new in self._encoders()]

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> None:
        from library.models.modules import new_vae

        self.vae = load_part(self._base.parts["vae"], new_vae, dtype, device)

    def load_unet(self, dtype: torch.dtype, device: torch.device | str) -> None:
        from library.models.modules import new_unet

        self.unet = load_part(self._base.parts["unet"], new_unet, dtype, device)

    def release_vae(self) -> None:
        self.vae = None

    def release_text_encoders(self) -> None:
        self.text_encoders = []

    def encode_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        assert self.vae is not None, "the VAE is not loaded"
        return self._latents.encode(self.vae, pixels_BCHW)

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        assert self.vae is not None, "the VAE is not loaded"
        return self._latents.decode(self.vae, latents_BCHW)

    def vae_fingerprint(self) -> str:
        from library.models.fingerprint import part_fingerprint

        return part_fingerprint(self._base.parts["vae"])

    def _reading(self) -> dict[str, Any]:
        """How captions become tokens: a part of `text_fingerprint`."""
        from library.models.fingerprint import folder_fingerprint
        from library.models.text.prompts import CLEANING

        return {
            "cleaning": CLEANING,
            "tokenizer": folder_fingerprint(self._base.tokenizer),
            "tokenizer options": dict(self._base.tokenizer_options),
            "tokens": self.token_limit,
            "weighted": self.weighted_captions,
        }

    def count_tokens(self, caption: str) -> int:
        from library.models.text.prompts import count_tokens

        return count_tokens(self._tokenizer, caption, weighted=self.weighted_captions)
