"""Chroma1, HD and Base: FLUX.1's transformer with less modulation, T5-XXL alone, the autoencoder of FLUX.1.

Lodestone Rock 2025, huggingface.co/lodestones/Chroma1-HD. The modulation of all blocks comes from the time alone, by
the distilled guidance layer; no guidance is told, and no pooled state of CLIP's. Of a text the blocks see the tokens
and the first one of its padding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_chroma
from library.models.checkpoints.flux_files import (
    CHROMA_PARTS,
    chroma_configurations,
    open_chroma,
    t5_tokenizer,
)
from library.models.checkpoints.part_files import with_part
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    PATCH,
    Fit,
    called,
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
from library.models.latent_diffusion import VAE
from library.models.text.t5 import T5, T5Tokens, t5_states

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.diffusion.flow import Flow
    from library.files.json_text import Config

logger = logging.getLogger(__name__)

_TOKENS = 512
_SHIFT = 3.0  # of the levels of samples, in Chroma1-HD's scheduler
_EXPECTED = {"unet": 418}  # of the true size
_WANTED = {
    "text_encoder": "--t5xxl, the file of the text encoder T5",
    "vae": "--ae, the file of FLUX.1's autoencoder",
}


class Chroma(FluxBlocks):
    """The family "chroma". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "chroma", "a Chroma model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_chroma_transformer",
            section="unet",
            prefix="lora_unet",
            linear=LINEAR,
            choices=CHOICES,
        ),
        "vae": VAE,
        "text_encoder": replace(T5, folder="text_encoder"),
    }
    STATED: ClassVar[Mapping[str, str]] = {"model_type": "chroma"}
    WITHOUT_EFFECT: ClassVar[Mapping[str, tuple[object, str]]] = {
        "guidance_scale": (0.0, "Chroma is told no guidance, as if it were 0")
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for FLUX and Chroma")
    base_model_version = "chroma"
    architecture = "chroma"
    implementation = "https://huggingface.co/lodestones/Chroma"
    native_resolution = 1024

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        t5xxl: str | None = None,
        ae: str | None = None,
        t5_tokenizer_path: str | None = None,
        t5xxl_max_token_length: int | None = None,
        apply_t5_attn_mask: bool = True,
        discrete_flow_shift: float | None = None,
        model_prediction_type: str = "raw",
        model_type: str | None = None,
    ) -> None:
        base, own = with_flux_autoencoder(base, vae, ae)
        if t5xxl:
            base = with_part(base, "text_encoder", CHROMA_PARTS["text_encoder"], t5xxl, option="t5xxl")
        refuse_missing(base, "Chroma", _WANTED)
        super().__init__(base, vae=own)
        self._config, self._scheduler = base.parts["denoiser"].config, base.scheduler
        refuse_misfits(base, _fits(base))
        self._t5 = T5Tokens(
            t5_tokenizer(base, t5_tokenizer_path),
            base.parts["text_encoder"].config,
            limit=t5xxl_max_token_length or _TOKENS,
            of=base.path,
        )
        self.token_limit = max(1, self._t5.limit - 1)  # the last one ends the text
        self._shift = 3.0 if discrete_flow_shift is None else discrete_flow_shift
        assert model_prediction_type == "raw", "the option takes nothing else"
        assert model_type in (None, self.NAME), "stated, and checked by open_family"
        self.latents = latent_space_of(base.parts["vae"].config)
        self.distilled = called(base, "flash")
        if not apply_t5_attn_mask:
            logger.info("T5's padding is hidden without --apply_t5_attn_mask, too: Chroma was made that way")

    @property
    def settings(self) -> dict[str, object]:
        return {
            "model_type": "chroma",
            "guidance_scale": 0.0,
            "discrete_flow_shift": self._shift,
            "model_prediction_type": "raw",
            "apply_t5_attn_mask": True,
            "t5xxl_max_token_length": self._t5.limit,
        }

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The original names of its blocks and its distilled guidance layer, or a folder of a ChromaPipeline."""
        return is_chroma(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_chroma(path, location, kind=cls.NAME)

    @classmethod
    def usual_configs(cls) -> Mapping[str, Config]:
        return chroma_configurations()

    # -- images

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples are shifted as a folder's scheduler says, else by 3."""
        from library.diffusion.flow import ResolutionShift

        by_size, of_folder = ResolutionShift(), self._scheduler
        always = same_shift(float(of_folder.get("shift", _SHIFT)))
        return flow_of(by_size if of_folder.get("use_dynamic_shifting") else always, self._shift, flux_shift=by_size)

    # -- texts

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined

        return combined(
            {
                "tokenizer": self._t5.fingerprint(),
                "tokens": self._t5.limit,
                "weights": self.components.fingerprint("text_encoder"),
            }
        )

    def count_tokens(self, caption: str) -> int:
        """Without the end."""
        return len(self._t5.content(caption))

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, L, D], "mask": [B, L]}: T5's states of the longest caption, and of the first token of
        its padding. Behind those of a shorter one are zeros, and zeros in the mask.

        A caption of as many tokens as there may be has no padding. T5 sees the tokens alone.
        """
        import torch

        t5 = self.components["text_encoder"]
        rows = self._t5.rows(captions)
        length = min(1 + max(map(len, rows)), self._t5.limit)
        ids, tokens = (to_device(table, device_of(t5)) for table in self._t5.table(rows, length))
        states = t5_states(t5, ids, tokens)
        mask = torch.cat([torch.ones_like(tokens[:, :1]), tokens[:, :-1]], dim=1)  # and one more than these
        return {"hidden_states": states * mask[..., None].to(states.dtype), "mask": mask}

    # -- the network

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1."""
        import torch

        from library.models.flux_tokens import exact_time, packed, places, unpacked, whole_mask

        transformer: Any = self.components["denoiser"]
        states, mask = _trimmed(condition["hidden_states"], condition["mask"])
        noisy_BCHW, states = in_its_dtype(transformer.x_embedder.weight, noisy_BCHW, states)
        height, width = (side // PATCH for side in noisy_BCHW.shape[2:])
        seen = None if mask is None else whole_mask(mask, height * width)[:, 0, 0]
        time = exact_time(transformer.time_text_embed, level_B, answer=transformer.x_embedder.weight.dtype)
        with time, _masked_checkpoints(transformer, seen):
            found = transformer(
                hidden_states=packed(noisy_BCHW),
                encoder_hidden_states=states,
                timestep=level_B,
                img_ids=places(height, width, device=noisy_BCHW.device),
                txt_ids=torch.zeros(states.shape[1], 3, device=noisy_BCHW.device),
                attention_mask=seen,
                return_dict=False,
            )[0]
        return unpacked(found, height, width)

    # -- adapters

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        return _EXPECTED if self._has_true_size else None

    def third_party_views(self) -> tuple[Any, Any]:
        """No text encoder: it is not trained."""
        return None, self.components.get("denoiser")

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """diffusers' defaults; of Flash, which is distilled from guidance and to few steps, without a negative
        prompt."""
        return Rendering(steps=16, scale=1.0, compared=1.0) if self.distilled else Rendering(steps=35, scale=5.0)


def _trimmed(states_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """The states as far as the longest text is seen, and the mask of them, or None where it hides nothing.

    What is cut off is hidden, so it changes no number; and without a mask attention has faster kernels. Tensors without
    contents, as estimates of memory have, are taken to be full.
    """
    import torch

    if type(mask_BL) is not torch.Tensor:
        return states_BLD, None if len(mask_BL) == 1 else mask_BL
    lengths = mask_BL.sum(dim=1).tolist()
    longest = int(max(lengths))
    return states_BLD[:, :longest], None if min(lengths) == longest else mask_BL[:, :longest]


@contextmanager
def _masked_checkpoints(transformer: Any, seen_BS: Tensor | None) -> Iterator[None]:
    """A context in which single blocks are given the mask under gradient checkpointing as well. diffusers 0.42 leaves
    it out there: padding would be seen in training and not in samples."""
    checkpoint = getattr(transformer, "_gradient_checkpointing_func", None)
    if checkpoint is None or seen_BS is None:
        yield
        return
    singles = set(transformer.single_transformer_blocks)

    def with_mask(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs[:3], seen_BS) if block in singles else checkpoint(block, *inputs)

    transformer._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint


def _fits(base: BaseModel) -> list[Fit]:
    """What the transformer needs of this text encoder and this autoencoder."""
    transformer, t5, vae = (base.parts[part].config for part in ("denoiser", "text_encoder", "vae"))
    channels = int(transformer.get("in_channels", 64)) // PATCH**2
    return [
        Fit("transformer", "T5 states of", transformer.get("joint_attention_dim", 4096), t5.get("d_model")),
        Fit("transformer", "latents of", channels, vae.get("latent_channels")),
    ]
