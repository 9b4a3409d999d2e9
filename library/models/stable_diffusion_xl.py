"""Stable Diffusion XL: UNet, VAE and two CLIP text encoders; predicts noise, some descendants velocity.

Podell et al. 2023, arXiv 2307.01952. Beside the text, the UNet is told the size that an image had, where it was cut and
to what size (§2.2). Both text encoders are read before their last layer; the second gives a summary of the prompt, too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.gpu import to_device
from library.models.checkpoints.base_model import BaseModel, Part
from library.models.checkpoints.checkpoint import original_unet_name
from library.models.checkpoints.opening import with_vae
from library.models.family import AdapterTargets
from library.models.latent_diffusion import (
    NOTHING,
    TEXT_LINEAR,
    UNET_CONV,
    UNET_LINEAR,
    LatentDiffusion,
    check_counts,
    prediction_type,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_SECOND_LINEAR = re.compile(rf"text_model\.{TEXT_LINEAR.pattern}")
_PARTS = ("text_encoder", "text_encoder_2")
_PADS = (None, 0)  # open_clip fills up with token 0, which is "!"; the vocabularies are the same

# What kohya's networks.lora finds in the true size.
_TRUE_TRANSFORMERS, _TRUE_WIDTHS = [1, 2, 10], [768, 1280]
_EXPECTED = {"unet": 722, "text_encoder_1": 72, "text_encoder_2": 192}
_EXPECTED_CONV = 66  # more in the UNet: 38 convolutions of 3 × 3, 28 Linear or 1 × 1


class StableDiffusionXL(LatentDiffusion):
    """The family "sdxl". Its members are described in `library.models.family.ModelFamily`."""

    name = "sdxl"
    base_model_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base"
    implementation = "https://github.com/Stability-AI/generative-models"
    clip_skip: int | None = None

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
            default_scaling=0.13025,
            default_cells=128,
            max_token_length=max_token_length,
            zero_terminal_snr=zero_terminal_snr,
            weighted_captions=weighted_captions,
        )

    def _encoders(self) -> list[tuple[Part, Callable[[Mapping[str, Any]], nn.Module]]]:
        from library.models.modules import new_projected_text_encoder, new_text_encoder

        kinds = zip(_PARTS, (new_text_encoder, new_projected_text_encoder), strict=True)
        return [(self._base.parts[part], new) for part, new in kinds]

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, part_fingerprint

        return combined({**self._reading(), "weights": [part_fingerprint(self._base.parts[part]) for part in _PARTS]})

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, token_limit + 2, D1 + D2], "pooled": [B, P]}. Differentiable, for adapters in both.

        Weights of words act on the hidden states only, as in kohya.
        """
        import torch

        from library.models.text.prompts import encode_penultimate, ids_and_weights, weigh

        states = []
        for part, pad, encoder in zip(_PARTS, _PADS, self.text_encoders, strict=True):
            ids, weights = ids_and_weights(
                self._tokenizer, captions, limit=self.token_limit, weighted=self.weighted_captions, pad=pad
            )
            layers = self._base.parts[part].config["num_hidden_layers"]
            of_encoder, pooled = encode_penultimate(encoder, to_device(ids, _device_of(encoder)), layers=layers)
            states.append(weigh(of_encoder, weights))
        assert pooled is not None, "the second text encoder has a projection"
        return {"hidden_states": torch.cat(states, dim=2), "pooled": pooled}

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

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as `prediction_type` says, [B, C, h, w]; t in 0 … 999."""
        import torch

        assert self.unet is not None, "the UNet is not loaded"
        states, pooled = condition["hidden_states"], condition["pooled"]
        # autocast, where it is on, casts what it must and keeps the digits of the rest
        if not torch.is_autocast_enabled(noisy_BCHW.device.type):
            dtype = self.unet.conv_in.weight.dtype
            noisy_BCHW, states, pooled = noisy_BCHW.to(dtype), states.to(dtype), pooled.to(dtype)
        added = {"text_embeds": pooled, "time_ids": condition["time_ids"]}
        return self.unet(noisy_BCHW, t_B, states, added_cond_kwargs=added, return_dict=False)[0]

    def _original_name(self, path: str) -> str:
        return original_unet_name(path, layers_per_block=self._base.parts["unet"].config["layers_per_block"])

    def adapter_targets(self) -> list[AdapterTargets]:
        found = {}
        if self.unet is not None:
            found["unet"] = AdapterTargets("unet", "lora_unet", self.unet, UNET_LINEAR, UNET_CONV, self._original_name)
        if self.text_encoders:
            first, second = self.text_encoders
            found["text_encoder_1"] = _text_targets("lora_te1", first, TEXT_LINEAR, "text_model.")
            found["text_encoder_2"] = _text_targets("lora_te2", second, _SECOND_LINEAR, "")
        for conv in (False, True):
            check_counts(found, self.expected_modules(conv=conv), conv=conv)
        return list(found.values())

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        transformers = self._base.parts["unet"].config.get("transformer_layers_per_block")
        widths = [self._base.parts[part].config["hidden_size"] for part in _PARTS]
        if transformers != _TRUE_TRANSFORMERS or widths != _TRUE_WIDTHS:
            return None
        return _EXPECTED | {"unet": _EXPECTED["unet"] + _EXPECTED_CONV * conv}

    def third_party_text_encoders(self) -> list[nn.Module]:
        """Both, as kohya's modules know them, with paths below "text_model."; empty ones if none is loaded."""
        from library.models.kohya_view import TextModelView

        if not self.text_encoders:
            return [TextModelView(None), TextModelView(None)]
        return [TextModelView(self.text_encoders[0]), self.text_encoders[1]]

    def third_party_unet(self) -> nn.Module | None:
        """The UNet as kohya's modules know it, with the original names."""
        from library.models.kohya_view import OriginalUNetView

        return None if self.unet is None else OriginalUNetView(self.unet, self._original_name)

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": positive["hidden_states"],
            "pooled_prompt_embeds": positive["pooled"],
            "negative_prompt_embeds": negative["hidden_states"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }

    def sampling_pipeline(self) -> Any:
        """A diffusers StableDiffusionXLPipeline with DDIM over the loaded parts, which it shares."""
        from library.models.modules import new_xl_pipeline, read_tokenizer

        assert self.vae is not None and self.unet is not None, "drawing needs them"  # noqa: PT018
        parts: dict[str, Any] = {"vae": self.vae, "unet": self.unet}
        parts |= dict.fromkeys((*_PARTS, "tokenizer", "tokenizer_2"))
        if self.text_encoders:  # prompts can be encoded before
            options = {**self._base.tokenizer_options, "pad_token": "!"}
            parts |= dict(zip(_PARTS, self.text_encoders, strict=True))
            parts |= {"tokenizer": self._tokenizer, "tokenizer_2": read_tokenizer(self._base.tokenizer, options)}
        return new_xl_pipeline(parts, self.process.scheduler("ddim"))


if TYPE_CHECKING:
    _conforms: type[ModelFamily] = StableDiffusionXL


def _text_targets(prefix: str, encoder: nn.Module, layers: re.Pattern[str], level: str) -> AdapterTargets:
    # transformers 5 dropped a level from the first one's paths that adapter files' keys still name
    return AdapterTargets("text_encoder", prefix, encoder, layers, NOTHING, lambda path: f"{level}{path}")


def _device_of(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device


def _check_widths(base: BaseModel) -> None:
    """UserError where the UNet wants other text states than the encoders give."""
    unet = base.parts["unet"].config
    first, second = (base.parts[part].config for part in _PARTS)
    given = first["hidden_size"] + second["hidden_size"]
    if unet["cross_attention_dim"] != given:
        raise UserError(
            f"{base.path}: the UNet wants text states of {unet['cross_attention_dim']} channels, the text encoders "
            f"give {first['hidden_size']} and {second['hidden_size']}"
        )
