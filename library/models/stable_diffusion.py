"""Stable Diffusion 1.x and 2.x: UNet, VAE and one CLIP text encoder; predicts noise or velocity.

Rombach et al. 2022, arXiv 2112.10752. 2.x differs in its text encoder (OpenCLIP ViT-H, the layer before the last, which
its configuration of 23 layers has built in) and in Linear layers around the attention blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError
from library.files.tensors import WeightsIndex
from library.gpu import to_device
from library.models.blocks import SD
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.checkpoint import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX
from library.models.checkpoints.detect import begins, is_of_xl, is_v2, other_family
from library.models.checkpoints.open_file import with_vae
from library.models.components import PartKind
from library.models.latent_diffusion import TEXT_ENCODER, UNET, VAE, LatentDiffusion, prediction_type

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.models.modules import Pipeline

logger = logging.getLogger(__name__)

# What kohya's networks.lora finds in the true sizes, by the width of the text states.
_TRUE_BLOCKS = [320, 640, 1280, 1280]
_EXPECTED = {768: {"unet": 192, "text_encoder": 72}, 1024: {"unet": 192, "text_encoder": 138}}
_EXPECTED_CONV = 86  # more in the UNet: 50 convolutions of 3 × 3, 36 Linear or 1 × 1


class StableDiffusion(LatentDiffusion):
    """The family "sd". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "sd", "a Stable Diffusion 1.x or 2.x model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": replace(UNET, blocks=SD),
        "vae": VAE,
        "text_encoder": TEXT_ENCODER,
    }
    TOKEN_TABLES: ClassVar[Mapping[str, str]] = {"text_encoder": "emb_params"}
    DEFAULT_SCALING, DEFAULT_CELLS = 0.18215, 64
    implementation = "diffusers"

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        v2: bool = False,
        v_parameterization: bool = False,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        zero_terminal_snr: bool = False,
        weighted_captions: bool = False,
    ) -> None:
        base = with_vae(base, vae) if vae else base
        self._is_v2 = _checked_v2(base, says_v2=v2)
        super().__init__(
            base,
            vae=vae,
            predicts=_prediction_type(base, v2=self._is_v2, says_v=v_parameterization),
            max_token_length=max_token_length,
            zero_terminal_snr=zero_terminal_snr,
            weighted_captions=weighted_captions,
        )
        velocity = self._predicts == "v_prediction"
        self.base_model_version = f"sd_v{2 if self._is_v2 else 1}{'_v' if velocity else ''}"
        self.architecture = "stable-diffusion-v1"
        if self._is_v2:
            self.architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        if base.location.is_file() and self._is_v2 and velocity:
            self.native_resolution = 768  # the shipped configuration is that of the 512 pixel version

        unet, text = base.parts["denoiser"].config, base.parts["text_encoder"].config
        self._text_width, self._layers = unet["cross_attention_dim"], text["num_hidden_layers"]
        self.clip_skip = clip_skip
        if clip_skip is not None and not 1 <= clip_skip <= self._layers:
            raise UserError(f"--clip_skip {clip_skip}: must be 1 … {self._layers}, the layers of this text encoder")

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """A UNet in the original layout with one CLIP or open_clip text encoder, or a folder with a UNet."""
        if isinstance(content, Folder):
            return content.config("unet") is not None and not is_of_xl(content) and not other_family(content)
        whole = begins(content, UNET_PREFIX) and begins(content, CLIP_PREFIX, OPEN_CLIP_PREFIX)
        return whole and not is_of_xl(content) and not other_family(content)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined

        weights = self.components.fingerprint("text_encoder")
        return combined({**self._reading(), "weights": weights, "clip skip": self.clip_skip or 1})

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, token_limit + 2, D]}. Differentiable, for adapters in the text encoder."""
        from library.models.text.prompts import encode, ids_and_weights, weigh

        encoder: Any = self.components["text_encoder"]
        ids, weights = ids_and_weights(self._reader, captions, limit=self.token_limit, weighted=self.weighted_captions)
        ids = to_device(ids, encoder.embeddings.position_ids.device)
        states = encode(encoder, ids, clip_skip=self.clip_skip, layers=self._layers)
        return {"hidden_states": weigh(states, weights)}

    def token_states(self, tokens: Sequence[int]) -> Tensor:
        from library.models.text.prompts import encode

        encoder: Any = self.components["text_encoder"]
        ids = to_device(self._alone(tokens), encoder.embeddings.position_ids.device)
        return encode(encoder, ids, clip_skip=self.clip_skip, layers=self._layers)

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as the process says, [B, C, h, w]; levels are timesteps 0 … 999."""
        import torch

        unet: Any = self.components["denoiser"]
        states = condition["hidden_states"]
        # no cast here: autocast, if it is on, casts where it must and keeps the precision of the rest
        if not torch.is_autocast_enabled(noisy_BCHW.device.type):
            dtype = unet.conv_in.weight.dtype
            noisy_BCHW, states = noisy_BCHW.to(dtype), states.to(dtype)
        return unet(noisy_BCHW, level_B, states, return_dict=False)[0]

    def adapter_name(self, part: str, path: str) -> str:
        """transformers 5 dropped a level of the text encoder's paths that adapter files' keys still name."""
        return f"text_model.{path}" if part == "text_encoder" else path

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        unet = self._base.parts["denoiser"].config
        if list(unet["block_out_channels"]) != _TRUE_BLOCKS or self._text_width not in _EXPECTED:
            return None
        expected = _EXPECTED[self._text_width]
        return expected | {"unet": expected["unet"] + _EXPECTED_CONV * conv}

    def third_party_views(self) -> tuple[nn.Module, nn.Module | None]:
        """The text encoder with paths below "text_model.", empty if it is not loaded; the UNet with its own paths."""
        from library.models.kohya_view import PlainUNetView, TextModelView

        encoder = self.components.get("text_encoder")
        unet = self.components.get("denoiser")
        return TextModelView(encoder), None if unet is None else PlainUNetView(unet)

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": positive["hidden_states"], "negative_prompt_embeds": negative["hidden_states"]}

    def pipeline(self) -> Pipeline:
        """A diffusers StableDiffusionPipeline with DDIM over the loaded parts, which it shares."""
        from library.models.modules import new_pipeline

        encoder = self.components.get("text_encoder")  # None where prompts were encoded before
        parts = {"vae": self.components["vae"], "text_encoder": encoder, "tokenizer": self._tokenizer}
        return new_pipeline({**parts, "unet": self.components["denoiser"]}, self.process.scheduler("ddim"))


def _checked_v2(base: BaseModel, *, says_v2: bool) -> bool:
    """Whether the model is 2.x. UserError where the user says so and it is not, or where its parts do not fit."""
    unet, text = base.parts["denoiser"].config, base.parts["text_encoder"].config
    width = unet["cross_attention_dim"]
    if width != text["hidden_size"]:
        raise UserError(
            f"{base.path}: the UNet needs text states of {width} channels, its text encoder has {text['hidden_size']}"
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
    """As `latent_diffusion.prediction_type`, with a warning where the answer is likely to be wrong."""
    found = prediction_type(base, says_v=says_v)
    if base.prediction is None and v2 and not says_v:
        logger.warning(
            "%s does not say whether it predicts noise or velocity: noise is assumed. For the 768 pixel versions of "
            "Stable Diffusion 2, give --v_parameterization",
            base.path,
        )
    if says_v and not v2 and base.prediction is None:
        logger.warning(
            "--v_parameterization with a Stable Diffusion 1.x model: is %s one that predicts velocity?", base.path
        )
    return found
