"""FLUX.1 dev and schnell: a transformer trained by flow matching, CLIP-L and T5-XXL, an autoencoder of 16 channels.

Black Forest Labs 2024, github.com/black-forest-labs/flux. Of CLIP the transformer gets the pooled state, of T5 all
states, padding included. dev is distilled from guidance, and is told how much; schnell is distilled to four steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_flux
from library.models.checkpoints.flux_files import PARTS, configurations, open_flux, t5_tokenizer
from library.models.checkpoints.part_files import with_part
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    PATCH,
    Fit,
    flow_of,
    in_its_dtype,
    latent_space_of,
    plain_noise,
    refuse_misfits,
    refuse_missing,
    same_shift,
    with_flux_autoencoder,
)
from library.models.flux_blocks import CHOICES, LINEAR, FluxBlocks
from library.models.latent_diffusion import TEXT_CHOICES, TEXT_ENCODER, VAE
from library.models.text.t5 import T5, T5Tokens, t5_states

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from library.diffusion.flow import Flow
    from library.files.json_text import Config
    from library.models.modules import Tokenizer

logger = logging.getLogger(__name__)

_TEXTS = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}  # and the options that name their files
_CLIP_TOKENS, _T5_TOKENS = 75, {True: 512, False: 256}  # of T5 by whether the model is told a guidance (dev)
_EXPECTED = {"unet": 494, "text_encoder": 72}  # of the true size


class Flux1(FluxBlocks):
    """The family "flux". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "flux", "a FLUX.1 model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_flux_transformer",
            section="unet",
            prefix="lora_unet",
            linear=LINEAR,
            choices=CHOICES,
        ),
        "vae": VAE,
        "text_encoder": replace(TEXT_ENCODER, prefix="lora_te1", choices=TEXT_CHOICES),
        "text_encoder_2": T5,
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for FLUX")
    LEAVE_TEXT_ENCODERS = "FLUX.1 takes most of a text from T5, which is not trained, and its LoRAs leave CLIP alone"
    STATED: ClassVar[Mapping[str, str]] = {"model_type": "flux"}
    base_model_version = "flux1"
    implementation = "https://github.com/black-forest-labs/flux"
    native_resolution = 1024

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        clip_l: str | None = None,
        t5xxl: str | None = None,
        ae: str | None = None,
        t5_tokenizer_path: str | None = None,
        t5xxl_max_token_length: int | None = None,
        apply_t5_attn_mask: bool = False,
        guidance_scale: float = 1.0,
        discrete_flow_shift: float | None = None,
        model_prediction_type: str = "raw",
        model_type: str | None = None,
    ) -> None:
        base, own = with_flux_autoencoder(base, vae, ae)
        files = {"text_encoder": clip_l, "text_encoder_2": t5xxl}
        for part, path in files.items():
            base = with_part(base, part, PARTS[part], path, option=_TEXTS[part]) if path else base
        options = {part: f"--{option}" for part, option in {**_TEXTS, "vae": "ae"}.items()}
        refuse_missing(base, "FLUX.1", options, behind=", the others' files")
        super().__init__(base, vae=own)
        self._base, self._config = base, base.parts["denoiser"].config
        refuse_misfits(base, _fits(base))
        self._told = bool(self._config.get("guidance_embeds"))
        self.distilled = not self._told
        self.architecture = "flux-1-dev" if self._told else "flux-1-schnell"
        self._t5 = T5Tokens(
            t5_tokenizer(base, t5_tokenizer_path),
            base.parts["text_encoder_2"].config,
            limit=t5xxl_max_token_length or _T5_TOKENS[self._told],
            of=base.path,
        )
        self.token_limit = self._t5.limit - 1  # the last one ends the text
        self._masks, self._guidance = apply_t5_attn_mask, guidance_scale
        self._shift = 3.0 if discrete_flow_shift is None else discrete_flow_shift
        assert model_prediction_type == "raw", "the option takes nothing else"
        assert model_type in (None, self.NAME), "stated, and checked by open_family"
        self.latents = latent_space_of(base.parts["vae"].config)
        self._warn()

    def _warn(self) -> None:
        if self._guidance != 1 and not self._told:
            logger.warning("--guidance_scale %g has no effect: %s is told no guidance", self._guidance, self.path)
        elif self._guidance != 1:
            logger.warning(
                "--guidance_scale %g: the LoRA learns what the model does when it is told so much; 1 is usual, and "
                "samples with 3.5 are better for it",
                self._guidance,
            )

    @property
    def settings(self) -> dict[str, object]:
        return {
            "model_type": "flux",
            "guidance_scale": self._guidance,
            "discrete_flow_shift": self._shift,
            "model_prediction_type": "raw",
            "apply_t5_attn_mask": self._masks,
            "t5xxl_max_token_length": self._t5.limit,
        }

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The original names of its blocks and norms, or a folder of a FluxPipeline."""
        return is_flux(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_flux(path, location, kind=cls.NAME)

    @classmethod
    def usual_configs(cls) -> Mapping[str, Config]:
        return configurations()

    # -- images

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples of dev are shifted by their size, those of schnell are not."""
        from library.diffusion.flow import ResolutionShift

        by_size = ResolutionShift()
        return flow_of(by_size if self._told else same_shift(1.0), self._shift, flux_shift=by_size)

    # -- texts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from library.models.modules import read_tokenizer

        return read_tokenizer(self._base.tokenizer, self._base.tokenizer_options)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint
        from library.models.text.prompts import CLEANING

        return combined(
            {
                "cleaning": CLEANING,
                "tokenizers": [folder_fingerprint(self._base.tokenizer), self._t5.fingerprint()],
                "tokens": self._t5.limit,
                "mask": self._masks,
                "weights": [self.components.fingerprint(part) for part in _TEXTS],
            }
        )

    def count_tokens(self, caption: str) -> int:
        """T5's, without the end."""
        return len(self._t5.content(caption))

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"pooled": [B, P] of CLIP, "hidden_states": [B, L, D] of T5}, and with --apply_t5_attn_mask "mask" [B, L].

        L is always T5's maximum: padding is seen, unless it is masked. Differentiable in CLIP.
        """
        from library.models.text.prompts import chunked_ids

        clip: Any = self.components["text_encoder"]
        ids = chunked_ids(self._tokenizer, captions, limit=_CLIP_TOKENS)[:, 0]
        pooled = clip(to_device(ids, device_of(clip))).pooler_output
        t5 = self.components["text_encoder_2"]
        tables = self._t5.table(self._t5.rows(captions), self._t5.limit)
        ids, mask = (to_device(table, device_of(t5)) for table in tables)
        states = t5_states(t5, ids, mask if self._masks else None)
        return {"pooled": pooled, "hidden_states": states, **({"mask": mask} if self._masks else {})}

    # -- the network

    def condition(
        self,
        texts: Mapping[str, Tensor],
        *,
        original_sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """The texts and "guidance" [B], that of training; sizes and crops are not told."""
        import torch

        pooled = texts["pooled"]
        return {**texts, "guidance": torch.full((len(pooled),), self._guidance, device=pooled.device)}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1."""
        import torch

        from library.models.flux_tokens import exact_time, packed, places, unpacked, whole_mask

        transformer: Any = self.components["denoiser"]
        states, pooled = condition["hidden_states"], condition["pooled"]
        noisy_BCHW, states, pooled = in_its_dtype(transformer.x_embedder.weight, noisy_BCHW, states, pooled)
        height, width = (side // PATCH for side in noisy_BCHW.shape[2:])
        masked = {"attention_mask": whole_mask(condition["mask"], height * width)} if "mask" in condition else None
        with exact_time(transformer.time_text_embed, level_B):
            found = transformer(
                hidden_states=packed(noisy_BCHW),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=level_B,
                guidance=condition["guidance"] if self._told else None,
                img_ids=places(height, width, device=noisy_BCHW.device),
                txt_ids=torch.zeros(states.shape[1], 3, device=noisy_BCHW.device),
                joint_attention_kwargs=masked,
                return_dict=False,
            )[0]
        return unpacked(found, height, width)

    # -- adapters

    def adapter_name(self, part: str, path: str) -> str:
        """The original names; and transformers 5 dropped a level from the text encoder's paths."""
        return f"text_model.{path}" if part == "text_encoder" else super().adapter_name(part, path)

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        layers = self._base.parts["text_encoder"].config["num_hidden_layers"]
        return _EXPECTED if self._has_true_size and layers * 6 == _EXPECTED["text_encoder"] else None

    def third_party_views(self) -> tuple[Any, Any]:
        """CLIP alone of the text encoders, with paths below "text_model."."""
        from library.models.kohya_view import TextModelView

        return TextModelView(self.components.get("text_encoder")), self.components.get("denoiser")

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """Without a negative prompt; dev with its own guidance, schnell in four steps."""
        if self._told:
            return Rendering(steps=20, scale=1.0, compared=1.0, guidance=3.5)
        return Rendering(steps=4, scale=1.0, compared=1.0)


def _fits(base: BaseModel) -> list[Fit]:
    """What the transformer needs of these text encoders and this autoencoder."""
    transformer, clip, t5, vae = (base.parts[part].config for part in ("denoiser", *_TEXTS, "vae"))
    channels = int(transformer.get("in_channels", 64)) // PATCH**2
    return [
        Fit("transformer", "a CLIP state of", transformer.get("pooled_projection_dim", 768), clip.get("hidden_size")),
        Fit("transformer", "T5 states of", transformer.get("joint_attention_dim", 4096), t5.get("d_model")),
        Fit("transformer", "latents of", channels, vae.get("latent_channels")),
    ]
