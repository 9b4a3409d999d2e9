"""Stable Diffusion 1.x and 2.x: UNet, VAE and one CLIP text encoder; predicts noise or velocity.

Rombach et al. 2022, arXiv 2112.10752. 2.x differs in its text encoder (OpenCLIP ViT-H, the layer before the last, which
its configuration of 23 layers has built in) and in Linear layers around the attention blocks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.models.base_model import BaseModel
from library.models.detect import is_v2
from library.models.family import AdapterTargets

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_TOKEN_LIMITS = (75, 150, 225)
_DEFAULT_SCALING = 0.18215  # of the VAE's latents, where its configuration is older than the field
_SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # both versions', where not stated

_BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_UNET_LINEAR = re.compile(
    rf"{_BLOCK}\.attentions\.\d+\."
    r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
)
_UNET_CONV = re.compile(
    rf"{_BLOCK}\.(?:resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)|(?:down|up)samplers\.\d+\.conv)"
)
_TEXT_LINEAR = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
_NOTHING = re.compile(r"(?!)")

# What kohya's networks.lora finds in the true sizes, by the width of the text states.
_TRUE_BLOCKS = [320, 640, 1280, 1280]
_EXPECTED = {768: {"unet": 192, "text_encoder": 72}, 1024: {"unet": 192, "text_encoder": 138}}
_EXPECTED_CONV = 86  # more in the UNet: 50 convolutions of 3 × 3, 36 Linear or 1 × 1


class StableDiffusion:
    """The family "sd". Its members are described in `library.models.family.ModelFamily`."""

    name = "sd"

    def __init__(
        self,
        base: BaseModel,
        *,
        v2: bool,
        v_parameterization: bool,
        vae: str | None,
        clip_skip: int | None,
        max_token_length: int | None,
        zero_terminal_snr: bool = False,
        weighted_captions: bool = False,
    ) -> None:
        self._base = base = base.with_vae(vae) if vae else base
        self.path, self.vae_path = base.path, vae
        unet, text = base.parts["unet"].config, base.parts["text_encoder"].config
        self._text_width, self._layers = unet["cross_attention_dim"], text["num_hidden_layers"]
        self._is_v2 = _checked_v2(base, says_v2=v2)
        self.prediction_type = _prediction_type(base, v2=self._is_v2, says_v=v_parameterization)
        self._scheduler = _scheduler(base, self.prediction_type, zero_terminal_snr=zero_terminal_snr)
        velocity = self.prediction_type == "v_prediction"
        self.base_model_version = f"sd_v{2 if self._is_v2 else 1}{'_v' if velocity else ''}"
        self.architecture = "stable-diffusion-v1"
        if self._is_v2:
            self.architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"

        config = _vae_config(base)
        self.latent_channels = int(config.get("latent_channels", 4))
        self.vae_factor = 2 ** (len(config["block_out_channels"]) - 1)
        self._scaling = float(config.get("scaling_factor") or _DEFAULT_SCALING)
        self._shift = float(config.get("shift_factor") or 0.0)
        sample_size = unet.get("sample_size") or 64
        self.native_resolution = int(sample_size if isinstance(sample_size, int) else sample_size[0]) * self.vae_factor
        if base.location.is_file() and self._is_v2 and velocity:
            self.native_resolution = 768  # the shipped configuration is that of the 512 pixel version

        self.clip_skip = clip_skip
        if clip_skip is not None and not 1 <= clip_skip <= self._layers:
            raise UserError(f"clip_skip {clip_skip}: must be 1 … {self._layers}, the layers of this text encoder")
        self.token_limit = max_token_length or _TOKEN_LIMITS[0]
        if self.token_limit not in _TOKEN_LIMITS:
            raise UserError(f"max_token_length {max_token_length}: must be one of {', '.join(map(str, _TOKEN_LIMITS))}")
        self.weighted_captions = weighted_captions

        self.vae: nn.Module | None = None
        self.text_encoders: list[nn.Module] = []
        self.unet: nn.Module | None = None

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        from library.models.noise_schedule import alphas_cumprod

        return alphas_cumprod(self._scheduler, where=f"the scheduler of {self.path}")

    @cached_property
    def _tokenizer(self) -> Any:
        from library.models.modules import new_tokenizer

        return new_tokenizer(self._base.tokenizer, self._base.tokenizer_options)

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> None:
        from library.models.modules import new_vae

        self.vae = self._load("vae", new_vae, dtype, device)

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device | str) -> None:
        from library.models.modules import new_text_encoder

        self.text_encoders = [self._load("text_encoder", new_text_encoder, dtype, device)]

    def load_unet(self, dtype: torch.dtype, device: torch.device | str) -> None:
        from library.models.modules import new_unet

        self.unet = self._load("unet", new_unet, dtype, device)

    def _load(self, part: str, new: Any, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The part's module, filled, frozen and in evaluation mode."""
        from library.models.weights import fill

        source = self._base.parts[part]
        module: nn.Module = new(source.config)
        fill(module, source.entries(), dtype=dtype, device=device, where=source.where)
        return module.to(device).eval()  # `to` for buffers: the parameters are there

    def release_vae(self) -> None:
        self.vae = None

    def release_text_encoders(self) -> None:
        self.text_encoders = []

    def encode_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [B, C, h, w] in float32, scaled; pixels in [-1, 1].

        Computed in the precision that the VAE was loaded in, whatever autocast is in force around it.
        """
        import torch

        assert self.vae is not None, "the VAE is not loaded"
        weight = next(self.vae.parameters())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            latents = self.vae.encode(pixels_BCHW.to(weight.device, weight.dtype)).latent_dist
        return (latents.mean.float() - self._shift) * self._scaling, latents.std.float() * self._scaling

    def vae_fingerprint(self) -> str:
        from library.models.fingerprint import part_fingerprint

        return part_fingerprint(self._base.parts["vae"])

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint, part_fingerprint

        return combined(
            {
                "weights": part_fingerprint(self._base.parts["text_encoder"]),
                "tokenizer": folder_fingerprint(self._base.tokenizer),
                "tokenizer options": dict(self._base.tokenizer_options),
                "clip skip": self.clip_skip or 1,
                "tokens": self.token_limit,
                "weighted": self.weighted_captions,
            }
        )

    def count_tokens(self, caption: str) -> int:
        from library.models.prompts import content_tokens, weighted_tokens

        if self.weighted_captions:
            return len(weighted_tokens(self._tokenizer, caption)[0])
        return len(content_tokens(self._tokenizer, caption))

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, token_limit + 2, D]}. Differentiable, for adapters in the text encoder."""
        from library.models.prompts import chunked_ids, encode, weighted_ids

        (encoder,) = self.text_encoders
        weights = None
        if self.weighted_captions:
            ids, weights = weighted_ids(self._tokenizer, captions, limit=self.token_limit)
        else:
            ids = chunked_ids(self._tokenizer, captions, limit=self.token_limit)
        ids = ids.to(encoder.embeddings.position_ids.device)
        states = encode(encoder, ids, clip_skip=self.clip_skip, layers=self._layers)
        if weights is not None:
            states = states * weights[:, :, None].to(states)
        return {"hidden_states": states}

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as `prediction_type` says, [B, C, h, w]; t in 0 … 999."""
        import torch

        assert self.unet is not None, "the UNet is not loaded"
        states = condition["hidden_states"]
        # autocast, where it is on, casts what it must and keeps the digits of the rest
        if not torch.is_autocast_enabled(noisy_BCHW.device.type):
            dtype = self.unet.conv_in.weight.dtype
            noisy_BCHW, states = noisy_BCHW.to(dtype), states.to(dtype)
        return self.unet(noisy_BCHW, t_B, states, return_dict=False)[0]

    def adapter_targets(self) -> list[AdapterTargets]:
        found = []
        if self.unet is not None:
            found.append(AdapterTargets("unet", "lora_unet", self.unet, _UNET_LINEAR, _UNET_CONV, str))
        for encoder in self.text_encoders:
            found.append(AdapterTargets("text_encoder", "lora_te", encoder, _TEXT_LINEAR, _NOTHING, _text_name))
        for conv in (False, True):
            self._check_counts(found, conv=conv)
        return found

    def _check_counts(self, targets: Sequence[AdapterTargets], *, conv: bool) -> None:
        """A rename in diffusers or transformers must not silently train fewer modules."""
        expected = self.expected_modules(conv=conv)
        for target in targets:
            paths = [path for path, _ in target.root.named_modules()]
            count = sum(bool(target.linear.fullmatch(p) or (conv and target.conv.fullmatch(p))) for p in paths)
            known = expected[target.part] if expected else count
            assert count == known, f"{count} targets in {target.part}, where this architecture has {known}"

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        unet = self._base.parts["unet"].config
        if list(unet["block_out_channels"]) != _TRUE_BLOCKS or self._text_width not in _EXPECTED:
            return None
        expected = _EXPECTED[self._text_width]
        return expected | {"unet": expected["unet"] + _EXPECTED_CONV * conv}

    def third_party_text_encoders(self) -> nn.Module:
        """The text encoder as kohya's modules know it, with paths below "text_model."; empty if none is loaded."""
        from library.models.kohya_view import TextModelView

        return TextModelView(self.text_encoders[0] if self.text_encoders else None)

    def sampling_pipeline(self) -> Any:
        """A diffusers StableDiffusionPipeline with DDIM over the loaded parts, which it shares."""
        from library.models.modules import new_pipeline

        assert self.vae is not None and self.unet is not None, "drawing needs them"  # noqa: PT018
        encoder = self.text_encoders[0] if self.text_encoders else None  # prompts can be encoded before
        parts = {"vae": self.vae, "text_encoder": encoder, "tokenizer": self._tokenizer, "unet": self.unet}
        scheduler = _SCHEDULER | self._scheduler | {"prediction_type": self.prediction_type}
        return new_pipeline(parts, scheduler)


if TYPE_CHECKING:
    _conforms: type[ModelFamily] = StableDiffusion


def _text_name(path: str) -> str:
    # transformers 5 dropped the level that adapter files' keys still name
    return f"text_model.{path}"


def _checked_v2(base: BaseModel, *, says_v2: bool) -> bool:
    """Whether the model is 2.x. UserError where the user says so and it is not, or where its parts do not fit."""
    unet, text = base.parts["unet"].config, base.parts["text_encoder"].config
    width = unet["cross_attention_dim"]
    if width != text["hidden_size"]:
        raise UserError(
            f"{base.path}: the UNet wants text states of {width} channels, the text encoder gives {text['hidden_size']}"
        )
    found = is_v2(unet)
    if says_v2 and not found:
        raise UserError(
            f"--v2 was given, but {base.path} is a Stable Diffusion 1.x model (text states of {width} channels)"
        )
    if found and not says_v2:
        logger.info("%s is a Stable Diffusion 2.x model", base.path)
    return found


def _prediction_type(base: BaseModel, *, v2: bool, says_v: bool) -> str:
    """What the network predicts: as the model says itself, else as the user says, else noise."""
    if base.prediction == "v_prediction":
        if not says_v:
            logger.info("%s predicts velocity, says %s", base.path, base.prediction_from)
        return "v_prediction"
    if base.prediction == "epsilon" and says_v:
        message = f"--v_parameterization was given, but {base.path} predicts noise, says {base.prediction_from}"
        if base.location.is_dir():
            raise UserError(f'{message}; leave the flag out, or correct "prediction_type" in that file')
        logger.warning("%s; going by the flag", message)
    if base.prediction is None and v2 and not says_v:
        logger.warning(
            "%s does not say whether it predicts noise or velocity: noise is assumed. For the 768 pixel versions of "
            "Stable Diffusion 2, give --v_parameterization",
            base.path,
        )
    if says_v and not v2:
        logger.warning(
            "--v_parameterization with a Stable Diffusion 1.x model: is %s one that predicts velocity?", base.path
        )
    return "v_prediction" if says_v else "epsilon"


def _scheduler(base: BaseModel, prediction_type: str, *, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler's configuration, for training and drawing alike; rescaled if that is wanted."""
    config = dict(base.scheduler)
    if not zero_terminal_snr:
        return config
    if prediction_type == "epsilon":
        raise UserError(
            f"--zero_terminal_snr: {base.path} predicts noise, which at a last timestep of pure noise says nothing "
            "about the image; it is for models that predict v (--v_parameterization)"
        )
    # a drawing must begin at the last timestep, or it begins where there is signal (arXiv 2305.08891, §3.3)
    return config | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _vae_config(base: BaseModel) -> Mapping[str, Any]:
    """The VAE's configuration, which must fit the UNet's."""
    if "vae" not in base.parts:
        raise UserError(f"{base.path} holds no VAE; give one with --vae")
    config, unet = base.parts["vae"].config, base.parts["unet"].config
    inputs, latents = unet.get("in_channels", 4), config.get("latent_channels", 4)
    if inputs != latents:
        hint = "an inpainting model, which is not supported" if inputs == 9 else "another kind of model, or another VAE"
        raise UserError(f"{base.path}: the UNet takes {inputs} channels and the VAE gives {latents}: {hint}")
    return config
