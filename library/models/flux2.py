"""FLUX.2 klein, base and distilled, of 4 and 9 billion parameters: a transformer trained by flow matching, Qwen3-4B or
Qwen3-8B, an autoencoder whose patches of 2 × 2 cells are the transformer's cells.

Black Forest Labs 2026, github.com/black-forest-labs/flux2. Texts are written as a user's turn of a chat without
thinking and padded to 512 tokens; of each the transformer gets the states behind three of Qwen3's layers, padding
included. The distilled versions have the shapes and names of the base, and need four steps and no guidance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError
from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_flux2
from library.models.checkpoints.flux2_files import PARTS, is_distilled, open_flux2, with_few_layers
from library.models.checkpoints.flux2_names import original_name
from library.models.checkpoints.part_files import with_part
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    PATCH,
    Fit,
    flow_of,
    in_its_dtype,
    one_autoencoder,
    plain_noise,
    refuse_misfits,
    refuse_missing,
)
from library.models.flux_blocks import FluxBlocks
from library.models.text import qwen
from library.models.text.language import never_in_fp16, padded, read_qwen3_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from library.diffusion.flow import Flow
    from library.models.modules import Tokenizer
    from library.offload.swap import Block

_LINEAR = re.compile(
    r"transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|"
    r"ff(?:_context)?\.linear_(?:in|out))|"
    r"single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)"
)
_CHOICES = {
    # the single blocks' layers are of attention and MLP at once
    "attn-only": re.compile(r"transformer_blocks\.\d+\.attn\..*|single_transformer_blocks\.\d+\.attn\..*"),
    "attn-qv": re.compile(r".*\.attn\.(?:to_[qv]|add_[qv]_proj|to_qkv_mlp_proj)"),
}
_LAYERS = (9, 18, 27)  # of Qwen3, behind which states are taken
_SIZES = {(5, 20): ("4b", 100), (8, 24): ("9b", 144)}  # by the numbers of blocks: name, and layers with adapters
_SHIFT = 3.0  # of levels that are drawn by sigma and shift
_THOUGHTS = ("<think>", "</think>")
_BEHIND = qwen.BEHIND + "\n\n".join([*_THOUGHTS, ""])  # with thinking off
_PADDING = "<|endoftext|>"


class Flux2Klein(FluxBlocks):
    """The family "flux2". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "flux2", "a FLUX.2 klein model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_flux2_transformer",
            section="unet",
            prefix="lora_unet",
            linear=_LINEAR,
            choices=_CHOICES,
        ),
        "vae": PartKind(folder="vae", title="VAE", new="library.models.modules.new_flux2_vae"),
        "text_encoder": qwen.FROZEN,
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for FLUX.2, of musubi-tuner,")
    TIMESTEP_SAMPLING = "flux2_shift"
    implementation = "https://github.com/black-forest-labs/flux2"
    native_resolution = 1024

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        ae: str | None = None,
        qwen3: str | None = None,
        qwen3_tokenizer_path: str | None = None,
        qwen3_max_token_length: int = 512,
        discrete_flow_shift: float | None = None,
        model_version: str | None = None,
    ) -> None:
        from library.diffusion.latents import PatchLatentSpace

        own = one_autoencoder(vae, ae)
        for part, option, path in (("text_encoder", "qwen3", qwen3), ("vae", "ae" if ae else "vae", own)):
            base = with_part(base, part, PARTS[part], path, option=option) if path else base
        refuse_missing(base, "FLUX.2 klein", _WANTED)
        base = qwen.with_own_tokenizer(base, qwen3_tokenizer_path)
        refuse_misfits(base, _fits(base))
        base = with_few_layers(base, _LAYERS[-1] + 1)  # the last state of all would be normalised
        super().__init__(base, vae=own)
        self._base, self._config = base, base.parts["denoiser"].config
        self._counts = (int(self._config["num_layers"]), int(self._config["num_single_layers"]))
        size, _ = _SIZES.get(self._counts, ("", 0))
        self.distilled = _distilled(base, size, model_version)
        self.base_model_version = f"flux_2_klein_{size}".removesuffix("_")
        self.architecture = f"Flux.2-klein-{size}".removesuffix("-")
        self._tokens = qwen3_max_token_length
        self.token_limit = max(1, qwen3_max_token_length - qwen.TOKENS_BEFORE)
        self._shift = _SHIFT if discrete_flow_shift is None else discrete_flow_shift
        config = base.parts["vae"].config
        self.latents = PatchLatentSpace(
            channels=int(config.get("latent_channels", 32)) * PATCH**2,
            factor=2 ** (len(config["block_out_channels"]) - 1) * PATCH,
            scaling=1.0,
            overflows_fp16=True,
            patch=PATCH,
            eps=float(config.get("batch_norm_eps", 1e-4)),
        )

    @property
    def settings(self) -> dict[str, object]:
        return {"discrete_flow_shift": self._shift, "qwen3_max_token_length": self._tokens}

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The names of its modulation without an embedding of a guidance, or a folder of a Flux2KleinPipeline."""
        return is_flux2(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_flux2(path, location, kind=cls.NAME)

    # -- images

    @property
    def size_divisor(self) -> int:
        """A cell of the latents, which is a patch of the autoencoder's."""
        return self.latents.factor

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples are shifted by their size and their steps, drawn levels by their size as for FLUX.1,
        as musubi-tuner does it."""
        from library.diffusion.flow import ResolutionShift, StepsShift

        return flow_of(StepsShift(), self._shift, flux2_shift=ResolutionShift(patch=1))

    # -- texts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        config = self._base.parts["text_encoder"].config
        source = f"Qwen/Qwen3-{'8B' if config['hidden_size'] > _WIDTH_OF_4B else '4B'}"
        own = {"source": source, "of": self.path, "model": "FLUX.2 klein"}
        words = (*qwen.WORDS, *_THOUGHTS, _PADDING)
        return read_qwen3_tokenizer(self._base.tokenizer, rows=config["vocab_size"], words=words, **own)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint

        assert self._tokenizer is not None
        return combined(
            {
                "template": [qwen.BEFORE, _BEHIND],
                "layers": _LAYERS,
                "tokenizer": folder_fingerprint(self._base.tokenizer),
                "tokens": self._tokens,
                "weights": self.components.fingerprint("text_encoder"),
            }
        )

    def count_tokens(self, caption: str) -> int:
        """Those of the caption, without the words of the chat around it."""
        return len(self._tokenizer.encode(caption).ids)

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, L, 3 D]}: the states behind Qwen3's layers 9, 18 and 27, one beside the other.

        L is always the number of --qwen3_max_token_length: the transformer sees padding, whose states tell of the text
        before it. Within Qwen3 no token sees padding.
        """
        import torch

        encoder: Any = self.components["text_encoder"]
        rows = [self._tokenizer.encode(f"{qwen.BEFORE}{one}{_BEHIND}").ids[: self._tokens] for one in captions]
        tables = padded(rows, with_id=self._tokenizer.token_to_id(_PADDING), length=self._tokens)
        ids, mask = (to_device(table, device_of(encoder)) for table in tables)
        with torch.no_grad(), never_in_fp16(ids.device):
            found = encoder(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return {"hidden_states": torch.cat([found.hidden_states[layer] for layer in _LAYERS], dim=-1)}

    # -- the network

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1."""
        from library.models.flux_tokens import exact_time, places_of_flux2

        transformer: Any = self.components["denoiser"]
        weight = transformer.x_embedder.weight
        noisy_BCHW, states = in_its_dtype(weight, noisy_BCHW, condition["hidden_states"])
        height, width = noisy_BCHW.shape[2:]
        images, texts = places_of_flux2(height, width, states.shape[1], device=noisy_BCHW.device)
        with exact_time(transformer.time_guidance_embed.time_proj, level_B):
            found: Tensor = transformer(
                hidden_states=noisy_BCHW.flatten(2).transpose(1, 2),
                encoder_hidden_states=states,
                timestep=level_B,
                img_ids=images,
                txt_ids=texts,
                return_dict=False,
            )[0]
        return found.transpose(1, 2).unflatten(2, (height, width))

    def swap_blocks(self) -> list[Block]:
        """Of a double block, which is twice as large as a single one, its attention and each MLP by themselves."""
        from library.offload.swap import layers_in

        transformer: Any = self.components["denoiser"]
        doubles = [
            part for block in transformer.transformer_blocks for part in (block.attn, block.ff, block.ff_context)
        ]
        return [layers_in(part) for part in (*doubles, *transformer.single_transformer_blocks)]

    # -- adapters

    def adapter_name(self, part: str, path: str) -> str:
        """The original names; of the single blocks, whose layers are one in the model as well, they are one layer's."""
        return original_name(path)

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        return {"unet": _SIZES[self._counts][1]} if self._counts in _SIZES else None

    def third_party_views(self) -> tuple[Any, Any]:
        """No text encoder: it is not trained."""
        return None, self.components.get("denoiser")

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """The makers' settings of the base, or of the distilled versions: four steps, without a negative prompt."""
        return Rendering(steps=4, scale=1.0, compared=1.0) if self.distilled else Rendering(steps=50, scale=4.0)


_WIDTH_OF_4B = 2560  # of Qwen3-4B's states
_WANTED = {
    "text_encoder": "--qwen3, the file of the text encoder (Qwen3-4B of klein 4B, Qwen3-8B of klein 9B)",
    "vae": "--ae, the file of FLUX.2's autoencoder",
}


def _distilled(base: BaseModel, size: str, version: str | None) -> bool:
    """Whether the model is, as --model_version says, or else by its name. UserError for a version of another size."""
    if version is None:
        return is_distilled(base)
    if size and not version.endswith(size):
        raise UserError(f"--model_version {version}: {base.path} is klein {size.upper()} by its number of blocks")
    return "base" not in version


def _fits(base: BaseModel) -> list[Fit]:
    """What the transformer needs of the text encoder and the autoencoder."""
    transformer, encoder, vae = (base.parts[part].config for part in ("denoiser", "text_encoder", "vae"))
    if (layers := encoder.get("num_hidden_layers", 0)) <= _LAYERS[-1]:
        raise UserError(
            f"{base.parts['text_encoder'].where}: has {layers} layers, where FLUX.2 klein reads the states behind the "
            f"{_LAYERS[-1]}th and normalises none: another model's file"
        )
    states = encoder.get("hidden_size", 0) * len(_LAYERS)
    return [
        Fit("transformer", "states with", transformer.get("joint_attention_dim", 7680), states),
        Fit(
            "transformer",
            "latents with",
            transformer.get("in_channels", 128),
            vae.get("latent_channels", 32) * PATCH**2,
        ),
    ]
