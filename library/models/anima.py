"""Anima: a transformer of Cosmos-Predict2 trained by flow matching, Qwen3-0.6B, an LLM adapter, the VAE of Qwen-Image.

CircleStone Labs 2026, huggingface.co/circlestone-labs/Anima. The LLM adapter reads the caption twice: as tokens of T5,
which it has a table for and whose number is that of its states, and as the states of Qwen3, which these attend to.
Its states, with zeros behind them, are what the transformer sees of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.blocks import Blocks
from library.models.checkpoints.adapter_file import WrittenNaming
from library.models.checkpoints.anima_files import PARTS, open_anima
from library.models.checkpoints.anima_names import block_number, original_name
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_anima
from library.models.checkpoints.part_files import own_tokenizer, with_part
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    Fit,
    FlowMatching,
    called,
    flow_of,
    in_its_dtype,
    plain_noise,
    refuse_misfits,
    refuse_missing,
    same_shift,
)
from library.models.text import qwen
from library.models.text.language import never_in_fp16, padded, read_own_tokenizer, read_qwen3_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.diffusion.flow import Flow
    from library.models.modules import Tokenizer

_LINEAR = re.compile(
    r"transformer_blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2))",
)
_MODULATION = re.compile(r"transformer_blocks\.\d+\.norm[123]\.linear_[12]")
_LAYERS, _TEXT_LAYERS = 28, 28
_EXPECTED = {"unet": 280, "text_encoder": 196}  # of the true size
_STATES = 512  # of a text, for the transformer: zeros follow a shorter one's
_SHIFT = 3.0  # of the levels of samples


class Anima(FlowMatching):
    """The family "anima". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "anima", "an Anima model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_anima_transformer",
            section="unet",
            prefix="lora_unet",
            linear=_LINEAR,
            more=_MODULATION,
            choices={
                "attn-only": re.compile(r".*\.attn[12]\..*"),
                "attn-qv": re.compile(r".*\.attn[12]\.to_[qv]"),
            },
        ),
        "vae": PartKind(folder="vae", title="VAE", new="library.models.modules.new_qwen_vae"),
        "text_encoder": PartKind(
            folder="text_encoder",
            title="text encoder",
            new="library.models.modules.new_qwen3_encoder",
            section="text_encoder",
            prefix="lora_te",
            linear=qwen.LINEAR,
            choices={
                "attn-only": re.compile(r".*\.self_attn\..*"),
                "attn-qv": re.compile(r".*\.self_attn\.[qv]_proj"),
            },
            layer=re.compile(r"layers\.(\d+)\..*"),
            overflows_fp16=True,
        ),
        "text_encoder_2": PartKind(
            folder="text_conditioner",
            title="LLM adapter",
            new="library.models.modules.new_llm_adapter",
            overflows_fp16=True,
        ),
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for Anima")
    LEAVE_TEXT_ENCODERS = (
        "Anima's text encoder is a language model that most LoRAs leave alone, and diffusers loads no such layers"
    )
    TIMESTEP_SAMPLING = "sigmoid"
    FILE_NAMING: ClassVar[WrittenNaming] = "diffusers"
    base_model_version = "anima"
    architecture = "anima-preview"
    implementation = "https://huggingface.co/circlestone-labs/Anima"
    native_resolution = 1024

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None = None,
        qwen3: str | None = None,
        llm_adapter_path: str | None = None,
        qwen3_tokenizer_path: str | None = None,
        t5_tokenizer_path: str | None = None,
        qwen3_max_token_length: int = _STATES,
        t5_max_token_length: int = _STATES,
        discrete_flow_shift: float | None = None,
    ) -> None:
        from library.diffusion.latents import FrameLatentSpace

        files = {
            "text_encoder": ("qwen3", qwen3),
            "text_encoder_2": ("llm_adapter_path", llm_adapter_path),
            "vae": ("vae", vae),
        }
        for part, (option, path) in files.items():
            base = with_part(base, part, PARTS[part], path, option=option) if path else base
        refuse_missing(base, "Anima", _WANTED)
        tokenizers: dict[str, Path] = {}
        if qwen3_tokenizer_path:
            tokenizers["tokenizer"] = own_tokenizer(
                qwen3_tokenizer_path, option="qwen3_tokenizer_path", inside="tokenizer"
            )
        if t5_tokenizer_path:
            tokenizers["tokenizer_2"] = own_tokenizer(
                t5_tokenizer_path, option="t5_tokenizer_path", inside="t5_tokenizer"
            )
        base = replace(base, **tokenizers)  # type: ignore[arg-type]
        super().__init__(base, vae=vae)
        self.distilled = called(base, "turbo")
        self._base, self._config = base, base.parts["denoiser"].config
        refuse_misfits(base, _fits(base))
        self._qwen_tokens, self._t5_tokens = qwen3_max_token_length, t5_max_token_length
        self.token_limit = min(self._qwen_tokens, self._t5_tokens - 1)  # T5's last one ends the text
        self._shift = 1.0 if discrete_flow_shift is None else discrete_flow_shift
        config = base.parts["vae"].config
        self.latents = FrameLatentSpace(
            channels=int(config["z_dim"]),
            factor=2 ** len(config["temperal_downsample"]),
            scaling=1.0,
            overflows_fp16=True,
            means=tuple(config["latents_mean"]),
            deviations=tuple(config["latents_std"]),
        )

    @property
    def settings(self) -> dict[str, object]:
        return {
            "discrete_flow_shift": self._shift,
            "qwen3_max_token_length": self._qwen_tokens,
            "t5_max_token_length": self._t5_tokens,
        }

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The original names of its blocks, or a folder with a transformer and an LLM adapter."""
        return is_anima(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_anima(path, location, kind=cls.NAME)

    # -- images

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples are shifted by 3, whatever their size."""
        return flow_of(same_shift(_SHIFT), self._shift)

    def vae_fingerprint(self) -> str:
        from library.models.fingerprint import combined

        return combined({"weights": super().vae_fingerprint(), "latents": "the middle of their distribution"})

    # -- texts

    @cached_property
    def _qwen_tokenizer(self) -> Tokenizer:
        rows = self._base.parts["text_encoder"].config["vocab_size"]
        own = {"source": "Qwen/Qwen3-0.6B", "of": self.path, "model": "Anima"}
        return read_qwen3_tokenizer(self._base.tokenizer, rows=rows, **own)

    @cached_property
    def _t5_tokenizer(self) -> Tokenizer:
        rows = self._base.parts["text_encoder_2"].config["target_vocab_size"]
        own = {"option": "t5_tokenizer_path", "title": "T5", "source": "google/t5-v1_1-xxl"}
        return read_own_tokenizer(self._base.tokenizer_2, **own, of=self.path, model="Anima", rows=rows)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint

        assert self._qwen_tokenizer is not None
        assert self._t5_tokenizer is not None
        assert self._base.tokenizer_2 is not None
        return combined(
            {
                "tokenizers": [folder_fingerprint(each) for each in (self._base.tokenizer, self._base.tokenizer_2)],
                "tokens": [self._qwen_tokens, self._t5_tokens],
                "weights": [self.components.fingerprint(part) for part in self.components.text_encoders],
            }
        )

    def _t5_content(self, caption: str) -> list[int]:
        """T5's tokens of a caption without the end."""
        ids: list[int] = self._t5_tokenizer.encode(caption).ids
        return ids[:-1] if ids and ids[-1] == _T5_END else ids

    def _qwen_content(self, caption: str) -> list[int]:
        ids: list[int] = self._qwen_tokenizer.encode(caption).ids
        return ids

    def count_tokens(self, caption: str) -> int:
        """Qwen3's or T5's, of which there are more; without T5's end."""
        return max(len(self._qwen_content(caption)), len(self._t5_content(caption)))

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, L, D]}: the LLM adapter's states, as many as T5 has tokens, of the longest caption L.

        Behind those of a shorter one are zeros, as the transformer is given them in any case, so no mask is needed.
        Differentiable in the text encoder.
        """
        import torch

        encoder: Any = self.components["text_encoder"]
        adapter: Any = self.components["text_encoder_2"]
        qwen = [self._qwen_content(caption)[: self._qwen_tokens] for caption in captions]
        t5 = [[*self._t5_content(caption)[: self._t5_tokens - 1], _T5_END] for caption in captions]
        device = device_of(encoder)
        # an empty text is one state of zeros, which adds nothing: attention to no state at all would be undefined
        ids, seen = (to_device(table, device) for table in padded([row or [0] for row in qwen]))
        queries, wanted = (to_device(table, device) for table in padded(t5))
        written = torch.tensor([bool(row) for row in qwen]).view(-1, 1, 1)
        # without a mask: a token's state depends on those before it alone, and padding follows them
        with never_in_fp16(device) as mixed:
            states = encoder(input_ids=ids, use_cache=False).last_hidden_state
            states = states * (seen[..., None] * to_device(written, device)).to(states.dtype)
            states = states if mixed else states.to(adapter.embed.weight.dtype)
            found = adapter(states, queries, target_attention_mask=wanted, source_attention_mask=seen)
        return {"hidden_states": found}

    # -- the network

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1, which the network is told as they are."""
        import torch

        transformer: Any = self.components["denoiser"]
        states = condition["hidden_states"]
        noisy_BCHW, states = in_its_dtype(transformer.patch_embed.proj.weight, noisy_BCHW, states)
        mask = torch.zeros_like(noisy_BCHW[:, :1])  # of padding: there is none in whole images
        found: Tensor = transformer(
            hidden_states=torch.cat([noisy_BCHW, mask], dim=1)[:, :, None],
            timestep=level_B.float(),
            encoder_hidden_states=_with_zeros(states),
            return_dict=False,
        )[0]
        return found[:, :, 0]

    def denoiser_blocks(self) -> list[nn.Module]:
        transformer: Any = self.components["denoiser"]
        return list(transformer.transformer_blocks)

    # -- adapters

    def blocks(self) -> Blocks:
        return Blocks((("block", self._config["num_layers"]),), 0, block_number)

    def adapter_name(self, part: str, path: str) -> str:
        """The original names."""
        return original_name(path) if part == "denoiser" else path

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        layers = self._base.parts["text_encoder"].config["num_hidden_layers"]
        return _EXPECTED if (self._config["num_layers"], layers) == (_LAYERS, _TEXT_LAYERS) else None

    def third_party_views(self) -> tuple[Any, Any]:
        """Qwen3 alone of the text encoders."""
        return self.components.get("text_encoder"), self.components.get("denoiser")

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """Usual settings of its users."""
        return Rendering(steps=30, scale=4.0)


_T5_END = 1


def _with_zeros(states_BLD: Tensor) -> Tensor:
    """[B, 512, D]: the transformer attends to all of them, and has learnt to rest on the zeros."""
    import torch

    return torch.nn.functional.pad(states_BLD, (0, 0, 0, max(0, _STATES - states_BLD.shape[1])))


_WANTED = {
    "text_encoder": "--qwen3, the text encoder's file",
    "text_encoder_2": "--llm_adapter_path, the LLM adapter's file, which Anima has beside NVIDIA's Cosmos-Predict2",
    "vae": "--vae, the VAE's file",
}


def _fits(base: BaseModel) -> list[Fit]:
    """What each part needs of the one before it."""
    transformer, encoder, adapter, vae = (
        base.parts[part].config for part in ("denoiser", "text_encoder", "text_encoder_2", "vae")
    )
    return [
        Fit("LLM adapter", "states of the text encoder with", adapter["source_dim"], encoder["hidden_size"]),
        Fit("transformer", "states of the LLM adapter with", transformer["text_embed_dim"], adapter["target_dim"]),
        Fit("transformer", "latents with", transformer["in_channels"], vae["z_dim"]),
    ]
