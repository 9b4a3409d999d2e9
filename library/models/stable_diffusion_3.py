"""Stable Diffusion 3 and 3.5: a transformer trained by flow matching, CLIP-L, CLIP-G and T5-XXL, a VAE of 16 channels.

Esser et al. 2024, arXiv 2403.03206, github.com/Stability-AI/sd3.5. The transformer gets the states of both CLIP models
side by side and those of T5 behind them, padding included, and the pooled states of CLIP. T5 may be absent, as it was
for some of the texts in training: zeros are in its place then.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError
from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.blocks import Blocks
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_sd3
from library.models.checkpoints.flux_files import t5_tokenizer
from library.models.checkpoints.open_file import with_vae
from library.models.checkpoints.part_files import with_part
from library.models.checkpoints.sd3.files import PARTS, configurations, open_sd3, vae_config
from library.models.checkpoints.sd3.names import block_number, fused_name, fused_place, original_name
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    PATCH,
    Fit,
    FlowMatching,
    called,
    in_its_dtype,
    latent_space_of,
    plain_noise,
    refuse_misfits,
    refuse_missing,
)
from library.models.latent_diffusion import SECOND_TEXT_ENCODER, TEXT_CHOICES, TEXT_ENCODER, VAE, with_scaling
from library.models.text.t5 import T5, T5Tokens, t5_states

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from library.diffusion.flow import Flow
    from library.files.json_text import Config
    from library.models.flow_pipeline import FlowPipeline
    from library.models.modules import Tokenizer

logger = logging.getLogger(__name__)

_LINEAR = re.compile(
    r"transformer_blocks\.\d+\.(?:norm1(?:_context)?\.linear|attn2?\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|"
    r"ff(?:_context)?\.net\.(?:0\.proj|2))"
)
_MORE = re.compile(
    r"context_embedder|pos_embed\.proj|time_text_embed\.(?:timestep|text)_embedder\.linear_[12]|norm_out\.linear|proj_out"
)
_CLIPS = ("text_encoder", "text_encoder_2")
_TEXTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # and the files' options
_PADS = (None, 0)  # CLIP-L's own, EOS; of CLIP-G token 0
_CLIP_TOKENS, _T5_TOKENS = 75, 256
_SCALING = 1.5305  # of the latents
_SHIFT = 3.0  # of the levels of samples
_EXPECTED_TEXTS = {"text_encoder_1": 72, "text_encoder_2": 192}  # of the true sizes
_EXPECTED = {24: {"medium": 333, "5-medium": 385}, 38: {"5-large": 529}}  # by the number of blocks and the kind
_ARCHITECTURES = {"medium": "3-medium", "5-medium": "3-5-medium", "5-large": "3-5-large"}
_SCALES = {"medium": 7.0, "5-medium": 5.0, "5-large": 4.5}  # of guidance, as their makers have it


class StableDiffusion3(FlowMatching):
    """The family "sd3". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "sd3", "a Stable Diffusion 3 model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_sd3_transformer",
            section="unet",
            prefix="lora_unet",
            linear=_LINEAR,
            more=_MORE,
            choices={
                "attn-only": re.compile(r".*\.attn2?\..*"),
                "attn-qv": re.compile(r".*\.attn2?\.(?:to_[qv]|add_[qv]_proj)"),
            },
        ),
        "vae": VAE,
        "text_encoder": replace(TEXT_ENCODER, prefix="lora_te1", choices=TEXT_CHOICES),
        "text_encoder_2": SECOND_TEXT_ENCODER,
        "text_encoder_3": replace(T5, folder="text_encoder_3"),
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for SD3")
    LEAVE_TEXT_ENCODERS = "CLIP is a part of what Stable Diffusion 3 is told, and most of its LoRAs leave it alone"
    implementation = "https://github.com/Stability-AI/sd3.5"
    native_resolution = 1024

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        clip_l: str | None = None,
        clip_g: str | None = None,
        t5xxl: str | None = None,
        t5_tokenizer_path: str | None = None,
        t5xxl_max_token_length: int | None = None,
        apply_lg_attn_mask: bool = False,
        apply_t5_attn_mask: bool = False,
        clip_l_dropout_rate: float = 0.0,
        clip_g_dropout_rate: float = 0.0,
        t5_dropout_rate: float = 0.0,
        turbo: bool | None = None,
    ) -> None:
        files = {"text_encoder": clip_l, "text_encoder_2": clip_g, "text_encoder_3": t5xxl}
        for part, path in files.items():
            base = with_part(base, part, PARTS[part], path, option=_TEXTS[part]) if path else base
        base = with_vae(base, vae, usual=vae_config()) if vae else base
        refuse_missing(base, "Stable Diffusion 3", {part: f"--{_TEXTS[part]}" for part in _CLIPS} | {"vae": "--vae"})
        base = with_scaling(base, default=_SCALING)
        super().__init__(base, vae=vae)
        self._base, self._config = base, base.parts["denoiser"].config
        _refuse_exchanged_clips(base)
        refuse_misfits(base, _fits(base))
        self._has_t5 = "text_encoder_3" in base.parts
        self._t5_tokens = t5xxl_max_token_length or _T5_TOKENS
        folder = t5_tokenizer(base, t5_tokenizer_path)
        of_t5 = base.parts["text_encoder_3"].config if self._has_t5 else {}
        self._t5 = T5Tokens(folder, of_t5, limit=self._t5_tokens, of=self.path)
        self.token_limit = self._t5_tokens - 1 if self._has_t5 else _CLIP_TOKENS
        self._masks = {"apply_lg_attn_mask": apply_lg_attn_mask, "apply_t5_attn_mask": apply_t5_attn_mask}
        self._dropouts = {
            "clip_l_dropout_rate": clip_l_dropout_rate,
            "clip_g_dropout_rate": clip_g_dropout_rate,
            "t5_dropout_rate": t5_dropout_rate,
        }
        self.base_model_version = _kind(self._config)
        self.architecture = f"stable-diffusion-{_ARCHITECTURES[self.base_model_version]}"
        self.latents = latent_space_of(base.parts["vae"].config)
        self.longest_side = int(self._config["pos_embed_max_size"]) * self.size_divisor
        self.distilled = called(base, "turbo") if turbo is None else turbo
        self._warn()

    def _warn(self) -> None:
        if self._has_t5:
            return
        logger.warning(
            "%s has no T5: zeros take the place of its states, and of captions only what CLIP reads counts, %d tokens; "
            "--t5xxl gives one",
            *(self.path, _CLIP_TOKENS),
        )
        for name in ("apply_t5_attn_mask", "t5_dropout_rate"):
            if {**self._masks, **self._dropouts}[name]:
                logger.warning("--%s has no effect: there is no T5", name)

    @property
    def settings(self) -> dict[str, object]:
        dropouts = {name: rate for name, rate in self._dropouts.items() if rate}
        return {**self._masks, "t5xxl_max_token_length": self._t5_tokens, **dropouts}

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The original names of its blocks, or a folder of a StableDiffusion3Pipeline."""
        return is_sd3(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_sd3(path, location, kind=cls.NAME)

    @classmethod
    def usual_configs(cls) -> Mapping[str, Config]:
        return configurations()

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples are shifted by 3, whatever their size; drawn levels by --training_shift alone."""
        from library.diffusion.flow import Flow
        from library.diffusion.process import SAMPLINGS

        return Flow(_SHIFT, drawn=dict.fromkeys(SAMPLINGS, 1.0))

    # -- texts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from library.models.modules import read_tokenizer

        return read_tokenizer(self._base.tokenizer, self._base.tokenizer_options)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint
        from library.models.text.prompts import CLEANING

        tokenizers = [folder_fingerprint(self._base.tokenizer), *([self._t5.fingerprint()] if self._has_t5 else [])]
        return combined(
            {
                "cleaning": CLEANING,
                "tokenizers": tokenizers,
                "tokens": self._t5_tokens,
                "masks": list(self._masks.values()),
                "weights": [self.components.fingerprint(part) for part in self.components.text_encoders],
            }
        )

    def count_tokens(self, caption: str) -> int:
        """T5's, or, where there is none, CLIP's; without those that begin and end a text."""
        from library.models.text.prompts import content_tokens

        return len(self._t5.content(caption) if self._has_t5 else content_tokens(self._tokenizer, caption))

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"clip": [B, 77, L + G], "pooled": [B, L + G]} of both CLIP models, "t5" [B, N, D] where there is a T5.

        CLIP is read before its last layer, without the final norm. Differentiable in CLIP.
        """
        import torch

        from library.models.text.prompts import chunk_mask, chunked_ids, encode_penultimate

        mask = chunk_mask(self._tokenizer, captions) if self._masks["apply_lg_attn_mask"] else None
        states, pooled = [], []
        for part, pad in zip(_CLIPS, _PADS, strict=True):
            encoder = self.components[part]
            ids = to_device(chunked_ids(self._tokenizer, captions, limit=_CLIP_TOKENS, pad=pad), device_of(encoder))
            own = None if mask is None else to_device(mask, ids.device)
            layers = self._base.parts[part].config["num_hidden_layers"]
            of_encoder, of_text = encode_penultimate(encoder, ids, layers=layers, mask_BN77=own)
            states.append(of_encoder)
            pooled.append(of_text)
        found = {"clip": torch.cat(states, dim=2), "pooled": torch.cat(pooled, dim=1)}
        if self._has_t5:
            encoder = self.components["text_encoder_3"]
            tables = self._t5.table(self._t5.rows(captions), self._t5.limit)
            ids, seen = (to_device(table, device_of(encoder)) for table in tables)
            found["t5"] = t5_states(encoder, ids, seen if self._masks["apply_t5_attn_mask"] else None)
        return found

    def with_text_dropout(
        self, condition: Mapping[str, Tensor], draws: Callable[[str], Sequence[float]]
    ) -> Mapping[str, Tensor]:
        """Zeros in the place of what an encoder says, of each encoder independently."""
        import torch

        if not any(self._dropouts.values()):
            return condition
        kept, device = {}, condition["pooled"].device
        for name, rate in self._dropouts.items():
            kept[name] = to_device(torch.tensor([draw >= rate for draw in draws(name)]), device)
        width = int(self._base.parts["text_encoder"].config["hidden_size"])
        found = dict(condition)
        for name in ("clip", "pooled"):
            halves = condition[name].split([width, condition[name].shape[-1] - width], dim=-1)
            of_both = zip(halves, (kept["clip_l_dropout_rate"], kept["clip_g_dropout_rate"]), strict=True)
            found[name] = torch.cat([_only(half, keeps) for half, keeps in of_both], dim=-1)
        if "t5" in condition:
            found["t5"] = _only(condition["t5"], kept["t5_dropout_rate"])
        return found

    # -- the network

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1, and the network is told 1000 σ in float32."""
        import torch

        transformer: Any = self.components["denoiser"]
        places = transformer.config.pos_embed_max_size * PATCH
        if max(noisy_BCHW.shape[2:]) > places:
            raise UserError(f"{self.path} has places for {self.longest_side} pixels a side, and an image has more")
        clip, wide = condition["clip"], transformer.config.joint_attention_dim
        clip = torch.nn.functional.pad(clip, (0, wide - clip.shape[-1]))
        t5 = condition["t5"] if "t5" in condition else clip.new_zeros(len(clip), self._t5_tokens, wide)
        states, pooled = torch.cat([clip, t5.to(clip.dtype)], dim=1), condition["pooled"]
        noisy_BCHW, states, pooled = in_its_dtype(transformer.context_embedder.weight, noisy_BCHW, states, pooled)
        found: Tensor = transformer(
            hidden_states=noisy_BCHW,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=level_B.float() * 1000,
            return_dict=False,
        )[0]
        return found

    def denoiser_blocks(self) -> list[nn.Module]:
        """Its blocks of image and text."""
        transformer: Any = self.components["denoiser"]
        return [*transformer.transformer_blocks]

    # -- adapters

    def blocks(self) -> Blocks:
        return Blocks((("joint", self._config["num_layers"]),), 0, block_number)

    def adapter_name(self, part: str, path: str) -> str:
        """The original names; and transformers 5 dropped a level from the first text encoder's paths."""
        if part == "denoiser":
            return original_name(path)
        return f"text_model.{path}" if part == "text_encoder" else path

    def fused_name(self, part: str, name: str) -> str:
        return fused_name(name) if part == "denoiser" else ""

    def fused_place(self, part: str, name: str) -> int:
        return fused_place(name)

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        layers = [self._base.parts[part].config["num_hidden_layers"] * 6 for part in _CLIPS]
        own = _EXPECTED.get(self._config["num_layers"], {}).get(self.base_model_version)
        if own is None or layers != list(_EXPECTED_TEXTS.values()):
            return None
        return {"unet": own, **_EXPECTED_TEXTS}

    def third_party_views(self) -> tuple[Any, Any]:
        """Both CLIP models with paths below "text_model."; T5 is not trained."""
        from library.models.kohya_view import TextModelView

        first, second = (self.components.get(part) for part in _CLIPS)
        return [TextModelView(first), TextModelView(None) if second is None else second], self.components.get(
            "denoiser"
        )

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """Their makers' settings: by the kind, or of a Turbo."""
        if self.distilled:
            return Rendering(steps=4, scale=1.0, compared=1.0)
        return Rendering(steps=28, scale=_SCALES[self.base_model_version])

    def pipeline(self) -> FlowPipeline:
        from library.models.flow_pipeline import FlowPipeline

        return FlowPipeline(self, self.process, schedulers_levels=True)


def _kind(config: Mapping[str, Any]) -> str:
    """kohya's word for it: by the norms of queries and keys, which 3 has not, and the second attention of medium."""
    if not config.get("qk_norm"):
        return "medium"
    return "5-medium" if config.get("dual_attention_layers") else "5-large"


def _only(states: Tensor, keeps_B: Tensor) -> Tensor:
    """The states of some samples, and zeros for the others."""
    import torch

    shape = (-1, *[1] * (states.dim() - 1))
    return torch.where(keeps_B.view(shape), states, torch.zeros_like(states))


def _refuse_exchanged_clips(base: BaseModel) -> None:
    """UserError for the one in the place of the other: together they have as many channels."""
    first, second = (base.parts[part].config["hidden_size"] for part in _CLIPS)
    if first > second:
        raise UserError(
            f"{base.path}: its CLIP-L has states of {first} channels and its CLIP-G of {second}: --clip_l and --clip_g "
            "are exchanged"
        )


def _fits(base: BaseModel) -> list[Fit]:
    """What the transformer needs of these text encoders and this VAE."""
    transformer, first, second, vae = (base.parts[part].config for part in ("denoiser", *_CLIPS, "vae"))
    pooled = first["hidden_size"] + second["projection_dim"]
    found = [
        Fit("transformer", "pooled CLIP states of", transformer.get("pooled_projection_dim", 2048), pooled),
        Fit("transformer", "latents of", transformer.get("in_channels", 16), vae.get("latent_channels")),
    ]
    if "text_encoder_3" in base.parts:
        t5 = base.parts["text_encoder_3"].config.get("d_model")
        found.append(Fit("transformer", "T5 states of", transformer.get("joint_attention_dim", 4096), t5))
    return found
