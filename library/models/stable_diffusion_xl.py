"""Stable Diffusion XL: UNet, VAE and two CLIP text encoders; predicts noise, some descendants velocity.

Podell et al. 2023, arXiv 2307.01952. Beside the text, the UNet is conditioned on an image's original size, the place of
its crop and the crop's size (§2.2). Both text encoders are read before their last layer; the second also returns a
pooled state of the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError
from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.blocks import SDXL
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.checkpoint import UNET_PREFIX, original_unet_name
from library.models.checkpoints.detect import begins, is_of_xl, other_family
from library.models.checkpoints.open_file import with_vae
from library.models.components import NOTHING, PartKind
from library.models.latent_diffusion import (
    SECOND_TEXT_ENCODER,
    TEXT_ENCODER,
    UNET,
    VAE,
    LatentDiffusion,
    prediction_type,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.models.modules import Pipeline

logger = logging.getLogger(__name__)

_PARTS = ("text_encoder", "text_encoder_2")
_PADS = (None, 0)  # open_clip pads with token 0, which is "!"; the vocabularies are the same

# What kohya's networks.lora finds in the true size.
_TRUE_TRANSFORMERS, _TRUE_WIDTHS = [1, 2, 10], [768, 1280]
_EXPECTED = {"unet": 722, "text_encoder_1": 72, "text_encoder_2": 192}
_EXPECTED_CONV = 66  # more in the UNet: 38 convolutions of 3 × 3, 28 Linear or 1 × 1


class StableDiffusionXL(LatentDiffusion):
    """The family "sdxl". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "sdxl", "an SDXL model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": replace(UNET, blocks=SDXL, more=NOTHING),  # LyCORIS finds none of them in SDXL
        "vae": VAE,
        "text_encoder": replace(TEXT_ENCODER, prefix="lora_te1"),
        "text_encoder_2": SECOND_TEXT_ENCODER,
    }
    TOKEN_TABLES: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    LEAVE_TEXT_ENCODERS = "SDXL's text encoders are easily spoilt; most of its LoRAs leave them alone"
    DEFAULT_SCALING, DEFAULT_CELLS = 0.13025, 128
    base_model_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base"
    implementation = "https://github.com/Stability-AI/generative-models"

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
        if v2:
            raise UserError(f"--v2 was given, but {base.path} is an SDXL model")
        if clip_skip is not None:
            logger.warning("--clip_skip %d: has no effect: SDXL always reads the layer before the last", clip_skip)
        _check_widths(base)
        super().__init__(
            base,
            vae=vae,
            predicts=prediction_type(base, says_v=v_parameterization),
            max_token_length=max_token_length,
            zero_terminal_snr=zero_terminal_snr,
            weighted_captions=weighted_captions,
        )

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """A UNet with the original names of its two text encoders, or a folder with the marks of SDXL."""
        if isinstance(content, Folder):
            return is_of_xl(content) and content.config("unet") is not None and not other_family(content)
        whole = begins(content, UNET_PREFIX) and begins(content, "conditioner.embedders.")
        return is_of_xl(content) and whole and not other_family(content)

    def text_fingerprint(self) -> str:
        """Of both encoders."""
        from library.models.fingerprint import combined

        return combined({**self._reading(), "weights": [self.components.fingerprint(part) for part in _PARTS]})

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, token_limit + 2, D1 + D2], "pooled": [B, P]}. Differentiable, for adapters in both.

        Weights of words act on the hidden states only, as in kohya.
        """
        import torch

        from library.models.text.prompts import encode_penultimate, ids_and_weights, weigh

        states = []
        if self._with_word is not None:
            # By its configuration transformers pools at the largest token, which is EOS only in the old vocabulary
            second: Any = self.components["text_encoder_2"]
            second.text_model.eos_token_id = self._with_word.eos_token_id
        for part, pad in zip(_PARTS, _PADS, strict=True):
            encoder = self.components[part]
            ids, weights = ids_and_weights(
                self._reader, captions, limit=self.token_limit, weighted=self.weighted_captions, pad=pad
            )
            layers = self._base.parts[part].config["num_hidden_layers"]
            of_encoder, pooled = encode_penultimate(encoder, to_device(ids, device_of(encoder)), layers=layers)
            states.append(weigh(of_encoder, weights))
        return {"hidden_states": torch.cat(states, dim=2), "pooled": pooled}

    def token_states(self, tokens: Sequence[int]) -> Tensor:
        """Those of both encoders, side by side."""
        import torch

        from library.models.text.prompts import encode_penultimate

        found = []
        for part in _PARTS:
            encoder = self.components[part]
            ids = to_device(self._alone(tokens), device_of(encoder))
            layers = self._base.parts[part].config["num_hidden_layers"]
            found.append(encode_penultimate(encoder, ids, layers=layers)[0])
        return torch.cat(found, dim=2)

    def condition(
        self,
        texts: Mapping[str, Tensor],
        *,
        original_sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """The texts and "time_ids" [B, 6], whole numbers: original height and width, top, left, height, width."""
        import torch

        # each pair the other way round
        rows = [
            [*size[::-1], *crop[::-1], *target_size[::-1]] for size, crop in zip(original_sizes, crops, strict=True)
        ]
        return {**texts, "time_ids": to_device(torch.tensor(rows), texts["pooled"].device)}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as the process says, [B, C, h, w]; levels are timesteps 0 … 999."""
        import torch

        unet: Any = self.components["denoiser"]
        states, pooled = condition["hidden_states"], condition["pooled"]
        # no cast here: autocast, if it is on, casts where it must and keeps the precision of the rest
        if not torch.is_autocast_enabled(noisy_BCHW.device.type):
            dtype = unet.conv_in.weight.dtype
            noisy_BCHW, states, pooled = noisy_BCHW.to(dtype), states.to(dtype), pooled.to(dtype)
        added = {"text_embeds": pooled, "time_ids": condition["time_ids"]}
        return unet(noisy_BCHW, level_B, states, added_cond_kwargs=added, return_dict=False)[0]

    def _original_name(self, path: str) -> str:
        return original_unet_name(path, layers_per_block=self.components.config("denoiser")["layers_per_block"])

    def adapter_name(self, part: str, path: str) -> str:
        """The UNet's original names; and transformers 5 dropped a level from the first text encoder's paths."""
        if part == "denoiser":
            return self._original_name(path)
        return f"text_model.{path}" if part == "text_encoder" else path

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        transformers = self._base.parts["denoiser"].config.get("transformer_layers_per_block")
        widths = [self._base.parts[part].config["hidden_size"] for part in _PARTS]
        if transformers != _TRUE_TRANSFORMERS or widths != _TRUE_WIDTHS:
            return None
        return _EXPECTED | {"unet": _EXPECTED["unet"] + _EXPECTED_CONV * conv}

    def third_party_views(self) -> tuple[list[nn.Module], nn.Module | None]:
        """Both text encoders with paths below "text_model.", empty if not loaded; the UNet with the original names."""
        from library.models.kohya_view import OriginalUNetView, TextModelView

        encoders = self.components.loaded(*_PARTS)
        texts: list[nn.Module]
        texts = [TextModelView(encoders[0]), encoders[1]] if encoders else [TextModelView(None), TextModelView(None)]
        unet = self.components.get("denoiser")
        return texts, None if unet is None else OriginalUNetView(unet, self._original_name)

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": positive["hidden_states"],
            "pooled_prompt_embeds": positive["pooled"],
            "negative_prompt_embeds": negative["hidden_states"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }

    def pipeline(self) -> Pipeline:
        """A diffusers StableDiffusionXLPipeline with DDIM over the loaded parts, which it shares."""
        from library.models.modules import new_xl_pipeline, read_tokenizer

        parts: dict[str, object] = {"vae": self.components["vae"], "unet": self.components["denoiser"]}
        parts |= dict.fromkeys((*_PARTS, "tokenizer", "tokenizer_2"))
        if encoders := self.components.loaded(*_PARTS):  # prompts can be encoded before
            options = {**self._base.tokenizer_options, "pad_token": "!"}
            parts |= dict(zip(_PARTS, encoders, strict=True))
            parts |= {"tokenizer": self._tokenizer, "tokenizer_2": read_tokenizer(self._base.tokenizer, options)}
        return new_xl_pipeline(parts, self.process.scheduler("ddim"))


def _check_widths(base: BaseModel) -> None:
    """UserError if the UNet needs other text states than the encoders return."""
    unet = base.parts["denoiser"].config
    first, second = (base.parts[part].config for part in _PARTS)
    given = first["hidden_size"] + second["hidden_size"]
    if unet["cross_attention_dim"] != given:
        raise UserError(
            f"{base.path}: the UNet needs text states of {unet['cross_attention_dim']} channels, the text encoders "
            f"return {first['hidden_size']} and {second['hidden_size']}"
        )
