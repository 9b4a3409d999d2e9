"""The common part of Stable Diffusion 1.x, 2.x and XL: loading, the latents, the prediction type, the schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError
from library.models.checkpoints.base_model import ZERO_TERMINAL, BaseModel
from library.models.components import PartKind
from library.models.family import AdapterTargets, ModelFamily, TokenTable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from library.diffusion.ddpm import DDPM
    from library.diffusion.latents import LatentSpace
    from library.models.modules import Tokenizer
    from library.models.text.words import TokenizerWithWord
    from library.offload.swap import Block

logger = logging.getLogger(__name__)

TOKEN_LIMITS = (75, 150, 225)
SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # all versions' defaults

# The layers that adapters attach to, by their paths in diffusers' UNet and transformers' CLIPTextModel
_BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
UNET_LINEAR = re.compile(
    rf"{_BLOCK}\.attentions\.\d+\."
    r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
)
UNET_CONV = re.compile(
    rf"{_BLOCK}\.(?:resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)|(?:down|up)samplers\.\d+\.conv)"
)
UNET_MORE = re.compile(r"conv_in|conv_out|time_embedding\.linear_[12]")
UNET_CHOICES = {
    "attn-only": re.compile(r".*\.attn[12]\..*"),
    "attn-qv": re.compile(r".*\.attn[12]\.to_[qv]"),
}
TEXT_CHOICES = {
    "attn-only": re.compile(r".*\.self_attn\..*"),
    "attn-qv": re.compile(r".*\.self_attn\.[qv]_proj"),
}
TEXT_LINEAR = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
TEXT_LAYER = re.compile(r".*\.layers\.(\d+)\..*")

UNET = PartKind(
    folder="unet",
    title="UNet",
    new="library.models.modules.new_unet",
    section="unet",
    prefix="lora_unet",
    linear=UNET_LINEAR,
    conv=UNET_CONV,
    more=UNET_MORE,
    choices=UNET_CHOICES,
)
_SECTIONS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder_1", "lora_te2": "text_encoder_2"}
TEXT_ENCODER = PartKind(
    folder="text_encoder",
    title="text encoder",
    new="library.models.modules.new_text_encoder",
    section="text_encoder",
    prefix="lora_te",
    linear=TEXT_LINEAR,
    choices=TEXT_CHOICES,
    layer=TEXT_LAYER,
)
SECOND_TEXT_ENCODER = replace(
    TEXT_ENCODER,
    folder="text_encoder_2",
    title="second text encoder",
    new="library.models.modules.new_projected_text_encoder",
    prefix="lora_te2",
    linear=re.compile(rf"text_model\.{TEXT_LINEAR.pattern}"),
)
"""CLIP-G, as SDXL and Stable Diffusion 3 have it."""
VAE = PartKind(folder="vae", title="VAE", new="library.models.modules.new_vae")


def with_scaling(base: BaseModel, *, default: float) -> BaseModel:
    """`base` with the family's `default` if the VAE's configuration is older than the field scaling_factor.

    diffusers would then use Stable Diffusion 1's factor for any model.
    """
    part = base.parts.get("vae")
    if part is None or part.config.get("scaling_factor"):
        return base
    scaled = replace(part, config={**part.config, "scaling_factor": default})
    return replace(base, parts={**base.parts, "vae": scaled})


def latent_space(base: BaseModel) -> LatentSpace:
    """From the VAE's configuration, which must fit the UNet's and name the scale (see `with_scaling`)."""
    from library.diffusion.latents import LatentSpace

    if "vae" not in base.parts:
        raise UserError(f"{base.path} holds no VAE; give one with --vae")
    config, unet = base.parts["vae"].config, base.parts["denoiser"].config
    inputs, latents = unet.get("in_channels", 4), config.get("latent_channels", 4)
    if inputs != latents:
        hint = "an inpainting model, which is not supported" if inputs == 9 else "another kind of model, or another VAE"
        raise UserError(f"{base.path}: the UNet takes {inputs} channels and the VAE returns {latents}: {hint}")
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
    """Pixels of a side, from the UNet's configuration; `default`: latent cells, if the configuration has none."""
    size = base.parts["denoiser"].config.get("sample_size") or default
    return int(size if isinstance(size, int) else size[0]) * factor


def token_limit(max_token_length: int | None) -> int:
    """75, 150 or 225. UserError for anything else."""
    limit = max_token_length or TOKEN_LIMITS[0]
    if limit not in TOKEN_LIMITS:
        raise UserError(f"max_token_length {max_token_length}: must be one of {', '.join(map(str, TOKEN_LIMITS))}")
    return limit


def prediction_type(base: BaseModel, *, says_v: bool) -> str:
    """The prediction type: v if the user says so, else as the model states it, else noise.

    It cannot be seen in the weights, and configurations in converted folders are often wrong: the flag wins over them.
    """
    if says_v:
        if base.prediction == "epsilon":
            logger.warning(
                "--v_parameterization was given, but %s predicts noise, according to %s; the flag is used",
                *(base.path, base.prediction_from),
            )
        return "v_prediction"
    if base.prediction == "v_prediction":
        logger.info("%s predicts velocity, according to %s", base.path, base.prediction_from)
    return base.prediction or "epsilon"


def scheduler(base: BaseModel, prediction: str, *, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler's configuration, for training and sampling alike; rescaled for zero_terminal_snr."""
    config = dict(base.scheduler)
    if not zero_terminal_snr:
        if base.location.is_file() and prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
            logger.warning(
                "%s: it does not state that it predicts v, and models that predict noise cannot use such a schedule: "
                "the usual one is used; if it predicts v, give --v_parameterization",
                base.path,
            )
            return {name: value for name, value in config.items() if name not in ZERO_TERMINAL}
        return config
    if prediction == "epsilon":
        raise UserError(
            f"--zero_terminal_snr: {base.path} predicts noise, and at a last timestep of pure noise that contains "
            "nothing about the image; the option is for models that predict v (--v_parameterization)"
        )
    return config | ZERO_TERMINAL


def check_counts(targets: Sequence[AdapterTargets], expected: Mapping[str, int] | None, *, conv: bool) -> None:
    """A rename in diffusers or transformers must not silently train fewer modules. `expected`: by section."""
    for target in targets:
        paths = [path for path, _ in target.root.named_modules()]
        count = sum(bool(target.linear.fullmatch(p) or (conv and target.conv.fullmatch(p))) for p in paths)
        section = _SECTIONS[target.prefix]
        known = expected[section] if expected else count
        assert count == known, f"{count} targets in {section}, where this architecture has {known}"


def _swap_blocks(block: Any) -> Iterator[Block]:
    """The swap blocks of a down, middle or up block of the UNet, in the order in which they compute."""
    from library.offload.swap import layers_in

    for resnet, attention in zip_longest(block.resnets, getattr(block, "attentions", None) or ()):
        yield layers_in(resnet)
        if attention is not None:
            own = [layers_in(transformer) for transformer in attention.transformer_blocks]
            own[0] = [*layers_in(attention.proj_in), *own[0]]
            own[-1] += layers_in(attention.proj_out)
            yield from own
    for resampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
        yield layers_in(resampler)


class LatentDiffusion(ModelFamily):
    """The common part of these families. Each adds the condition of its UNet and its encoding of prompts."""

    DEFAULT_SCALING: ClassVar[float]
    """The scale of the latents, if the VAE's configuration is older than the field."""
    DEFAULT_CELLS: ClassVar[int]
    """Latent cells of a side, if the UNet's configuration is older than the field."""
    TOKEN_TABLES: ClassVar[Mapping[str, str]]
    """The name that each text encoder's vectors have in embedding files."""

    _with_word: TokenizerWithWord | None = None

    def __init__(
        self,
        base: BaseModel,
        *,
        vae: str | None,
        predicts: str,
        max_token_length: int | None,
        zero_terminal_snr: bool,
        weighted_captions: bool,
    ) -> None:
        """`base` has the VAE of `vae` already. `predicts`: "epsilon" or "v_prediction". Raises UserError."""
        self._base = base = with_scaling(base, default=self.DEFAULT_SCALING)
        super().__init__(base, vae=vae)
        self._predicts = predicts
        self._scheduler = scheduler(base, predicts, zero_terminal_snr=zero_terminal_snr)
        self.latents = latent_space(base)
        self.native_resolution = native_resolution(base, self.latents.factor, default=self.DEFAULT_CELLS)
        self.token_limit = token_limit(max_token_length)
        self.weighted_captions = weighted_captions

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        """A diffusers folder, or a file in the original layout."""
        from library.models.checkpoints.folder import open_folder
        from library.models.checkpoints.single_file import open_file

        return (open_folder if location.is_dir() else open_file)(path, location, kind=cls.NAME)

    @cached_property
    def process(self) -> DDPM:
        """DDPM with the noise schedule of the model's scheduler."""
        from library.diffusion.ddpm import DDPM
        from library.diffusion.noise_schedule import alphas_cumprod

        table = alphas_cumprod(self._scheduler, where=f"the scheduler of {self.path}")
        return DDPM(self._predicts, table, SCHEDULER | self._scheduler)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from library.models.modules import read_tokenizer

        return read_tokenizer(self._base.tokenizer, self._base.tokenizer_options)

    @property
    def _reader(self) -> Tokenizer:
        """What captions are read with: the tokenizer, with the word that was learnt."""
        return self._tokenizer if self._with_word is None else self._with_word

    def learn_word(self, word: str, *, vectors: int) -> None:
        from library.models.text.words import TokenizerWithWord

        self._with_word = TokenizerWithWord(self._tokenizer, word, vectors=vectors)

    def forget_word(self) -> None:
        self._with_word = None

    def token_ids(self, text: str) -> list[int]:
        from library.models.text.prompts import content_tokens

        return content_tokens(self._reader, text)

    def has_word(self, text: str) -> bool:
        assert self._with_word is not None, "no word was learnt"
        return self._with_word.is_in(text)

    def token_tables(self) -> list[TokenTable]:
        assert self._with_word is not None, "no word was learnt"
        tables = []
        for number, (part, key) in enumerate(self.TOKEN_TABLES.items(), 1):
            section = "embedding" if len(self.TOKEN_TABLES) == 1 else f"embedding_{number}"
            encoder: Any = self.components[part]
            tables.append(TokenTable(key, section, encoder.get_input_embeddings(), self._with_word.first))
        return tables

    def vocabulary(self) -> list[str]:
        names: list[str] = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        special = set(self._tokenizer.all_special_tokens)
        return [
            self._tokenizer.decode([token]).strip() + ("" if name.endswith("</w>") or name in special else "…")
            for token, name in enumerate(names)
        ]

    def _alone(self, tokens: Sequence[int]) -> Tensor:
        """Token ids [B, 1, 3] of texts of one token each."""
        import torch

        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return torch.tensor([[[bos, token, eos]] for token in tokens])

    def _reading(self) -> dict[str, Any]:
        """The settings by which captions become tokens: a part of `text_fingerprint`."""
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
        """The number of tokens without BOS and EOS; brackets that weight words do not count."""
        from library.models.text.prompts import count_tokens

        return count_tokens(self._reader, caption, weighted=self.weighted_captions)

    def denoiser_blocks(self) -> list[nn.Module]:
        """Down, middle and up."""
        unet: Any = self.components["denoiser"]
        return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]

    def swap_blocks(self) -> list[Block]:
        """Each ResNet block, transformer block and resampler. The projections around the transformer blocks of one
        attention block belong to its first and its last."""
        return [layers for block in self.denoiser_blocks() for layers in _swap_blocks(block)]

    def compiled_blocks(self) -> list[nn.Module]:
        """The ResNet blocks and the transformer blocks, not the sections that hold them: no two of those are equal."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        units = (ResnetBlock2D, BasicTransformerBlock)
        return [part for block in self.denoiser_blocks() for part in block.modules() if isinstance(part, units)]

    def adapter_targets(self, *names: str) -> list[AdapterTargets]:
        """As every family's, counted against the sizes that are known."""
        found = super().adapter_targets(*names)
        for conv in (False, True):
            check_counts(found, self.expected_modules(conv=conv), conv=conv)
        return found
