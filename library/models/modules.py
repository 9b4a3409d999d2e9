"""The modules that Stable Diffusion consists of, without their weights, from diffusers and transformers.

Importing one UNet makes diffusers import each optional package that it finds, bitsandbytes, peft and scipy among them,
although loading and running Stable Diffusion needs none: a second or two, and a line about CPU kernels that
bitsandbytes prints. They are hidden from it while it is being imported.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from library.diffusion.process import Scheduler
from library.files.json_text import Config

_OPTIONAL = ("bitsandbytes", "peft", "scipy")

# Objects of transformers and diffusers, which have no types
Tokenizer: TypeAlias = Any
Pipeline: TypeAlias = Any


@contextmanager
def lean_diffusers() -> Iterator[None]:
    """A context in which diffusers' modules are imported as if optional packages that are not loaded yet did not exist.

    Afterwards diffusers sees them again. The modules imported inside stay without them: loading a LoRA into a pipeline
    works in the same process, diffusers' `fuse_lora` and its beta noise schedules do not.
    """
    import diffusers.utils.import_utils as found

    flags = [f"_{package}_available" for package in _OPTIONAL if package not in sys.modules]
    hidden = {flag: getattr(found, flag) for flag in flags if hasattr(found, flag)}
    for flag in hidden:
        setattr(found, flag, False)
    # transformers warns that image processors, which nothing here uses, would like torchvision
    transformers = logging.getLogger("transformers")
    level = transformers.level
    transformers.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.setLevel(level)
        for flag, value in hidden.items():
            setattr(found, flag, value)


def _spare_peft() -> None:
    """Make a UNet's forward not import peft (and with it bitsandbytes) where there is no LoRA of peft's to scale.

    diffusers' own functions import it before they check that a weight of 1 leaves nothing to do.
    """
    import diffusers.utils as names
    import diffusers.utils.peft_utils as home

    for name in ("scale_lora_layers", "unscale_lora_layers"):
        original = getattr(home, name)
        if hasattr(original, "__wrapped__"):  # done already
            return

        @functools.wraps(original)
        def scale(model: nn.Module, weight: float | None = None, *, original: Any = original) -> None:
            if weight not in (None, 1.0):
                original(model, weight)

        setattr(home, name, scale)
        setattr(names, name, scale)


def new_unet(config: Config) -> nn.Module:
    """A UNet2DConditionModel on the meta device."""
    with lean_diffusers():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    _spare_peft()
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def new_vae(config: Config) -> nn.Module:
    """An AutoencoderKL on the meta device."""
    with lean_diffusers():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def new_text_encoder(config: Config) -> nn.Module:
    """A CLIPTextModel, its parameters on the meta device."""
    with lean_diffusers():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
    _give_positions(encoder)
    return encoder


def new_projected_text_encoder(config: Config) -> nn.Module:
    """A CLIPTextModelWithProjection, its parameters on the meta device."""
    with lean_diffusers():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))
    _give_positions(encoder.text_model)
    return encoder


def new_t5_encoder(config: Config) -> nn.Module:
    """A T5EncoderModel on the meta device, without dropout: it is never trained, and its states are cached."""
    with lean_diffusers():
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5EncoderModel
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict({**config, "dropout_rate": 0.0}))
    encoder.encoder.embed_tokens = encoder.shared  # one module, so that filling the one fills the other
    for module in encoder.modules():
        if hasattr(module, "wi_0"):
            vars(module)["forward"] = functools.partial(_gated, module)
    return encoder


def _gated(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The forward of T5DenseGatedActDense. transformers' own casts the states to the type that the last weight is held
    in, which is ruin for one of 8 bits."""
    states: torch.Tensor = layer.wo(layer.act(layer.wi_0(hidden)) * layer.wi_1(hidden))
    return states


def new_flux_transformer(config: Config) -> nn.Module:
    """A FluxTransformer2DModel on the meta device."""
    with lean_diffusers():
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    _spare_peft()
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(dict(config))


def new_sd3_transformer(config: Config) -> nn.Module:
    """An SD3Transformer2DModel on the meta device. Its last norms have (shift, scale) in their layer, as the original,
    and so as the files of adapters, have it, where diffusers' own have (scale, shift)."""
    with lean_diffusers():
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    _spare_peft()
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(dict(config))
    for norm in (transformer.norm_out, transformer.transformer_blocks[-1].norm1_context):
        vars(norm)["forward"] = functools.partial(_shift_first, norm)
    return transformer


def _shift_first(norm: Any, hidden: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """The forward of AdaLayerNormContinuous for a layer whose first half of rows is the shift."""
    shift, scale = norm.linear(norm.silu(conditioning).to(hidden.dtype)).chunk(2, dim=1)
    normed: torch.Tensor = norm.norm(hidden) * (1 + scale)[:, None] + shift[:, None]
    return normed


def new_flux2_transformer(config: Config) -> nn.Module:
    """A Flux2Transformer2DModel on the meta device."""
    with lean_diffusers():
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    _spare_peft()
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(dict(config))


def new_flux2_vae(config: Config) -> nn.Module:
    """An AutoencoderKLFlux2 on the meta device. The statistics of its latents, a batch norm's there, are parameters
    here: they are read with the weights."""
    with lean_diffusers():
        from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(dict(config))
        channels = vae.bn.num_features
        vae.bn = nn.ParameterDict({name: torch.empty(channels) for name in ("running_mean", "running_var")})
    return vae


def new_chroma_transformer(config: Config) -> nn.Module:
    """A ChromaTransformer2DModel, its parameters on the meta device.

    Its mask of keys hides them from all queries. diffusers' own hides every key from the queries of padding as well,
    and a softmax over nothing is undefined in some kernels; no one sees those queries' states in any case.
    """
    with lean_diffusers():
        from diffusers.models.transformers.transformer_chroma import (
            ChromaCombinedTimestepTextProjEmbeddings,
            ChromaTransformer2DModel,
        )
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
    _spare_peft()

    class MaskOfKeys(FluxAttnProcessor):
        def __call__(
            self,
            attn: nn.Module,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            image_rotary_emb: torch.Tensor | None = None,
        ) -> Any:
            # [B, 1, 1, L + N] of [B, 1, L + N, L + N]: the last row, which is that of an image's token
            keys = None if attention_mask is None else attention_mask[:, :, -1:]
            return super().__call__(attn, hidden_states, encoder_hidden_states, keys, image_rotary_emb)

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is made of a class that diffusers renames
        transformer: Any = ChromaTransformer2DModel.from_config(dict(config))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(MaskOfKeys())
    places, parts = transformer.time_text_embed.mod_proj.shape  # a table that is in no file
    transformer.time_text_embed = ChromaCombinedTimestepTextProjEmbeddings(parts // 2, places)
    made: nn.Module = transformer
    return made


def new_anima_transformer(config: Config) -> nn.Module:
    """A CosmosTransformer3DModel on the meta device. Its mask of padding, which is zero for whole images, is one more
    channel of its input here: diffusers resizes the mask with torchvision, which nothing else needs."""
    with lean_diffusers():
        from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
    _spare_peft()
    settings = dict(config)
    if settings.pop("concat_padding_mask", True):
        settings |= {"in_channels": settings["in_channels"] + 1, "concat_padding_mask": False}
    if settings.get("extra_pos_embed_type") is None:
        settings["max_size"] = _ANY_SIZE  # of the rotary angles alone, which follow from a formula
    with torch.device("meta"):
        return CosmosTransformer3DModel.from_config(settings)


_ANY_SIZE = (128, 4096, 4096)  # frames, latent rows and columns


def new_z_image_transformer(config: Config) -> nn.Module:
    """A ZImageTransformer2DModel on the meta device."""
    with lean_diffusers():
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    _spare_peft()
    with torch.device("meta"):
        return ZImageTransformer2DModel.from_config(dict(config))


def new_qwen_vae(config: Config) -> nn.Module:
    """An AutoencoderKLQwenImage on the meta device."""
    with lean_diffusers():
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    with torch.device("meta"):
        return AutoencoderKLQwenImage.from_config(dict(config))


def new_qwen3_encoder(config: Config) -> nn.Module:
    """A Qwen3Model, its parameters on the meta device."""
    with lean_diffusers():
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding
    settings = Qwen3Config.from_dict(dict(config))
    with torch.device("meta"):
        encoder = Qwen3Model(settings)
    encoder.rotary_emb = Qwen3RotaryEmbedding(settings)  # its table is in no file
    return encoder


def new_llm_adapter(config: Config) -> nn.Module:
    """An AnimaTextConditioner, its parameters on the meta device. It returns as many states as it is given tokens."""
    with lean_diffusers():
        from diffusers.models.condition_embedders.condition_embedder_anima import (
            AnimaRotaryEmbedding,
            AnimaTextConditioner,
        )
    with torch.device("meta"):
        adapter = AnimaTextConditioner.from_config({**config, "min_sequence_length": 0})
    adapter.rotary_emb = AnimaRotaryEmbedding(adapter.config.model_dim // adapter.config.num_attention_heads)
    return adapter


def _give_positions(encoder: Any) -> None:  # transformers has no types
    """Fill the table of positions 0, 1, 2, …, which no file contains."""
    positions = torch.arange(encoder.config.max_position_embeddings, device="cpu").expand(1, -1)
    encoder.embeddings.register_buffer("position_ids", positions, persistent=False)


def read_tokenizer(folder: Path, options: Config) -> Tokenizer:
    """A CLIPTokenizer. Reading one takes half a second, and SDXL needs a second one for each image: they are cached.

    Only from_pretrained reads vocab.json and merges.txt; the constructor ignores file names.
    """
    return _tokenizer(folder, json.dumps(dict(options), sort_keys=True))


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path, options: str) -> Tokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **json.loads(options))


@functools.lru_cache(maxsize=4)
def read_fast_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the tokenizer.json in a folder, or of vocab.json and merges.txt as Qwen has them, as the package
    tokenizers has it: `encode(text).ids`. It neither pads nor cuts off: a file that was written after use may say so.
    """
    from tokenizers import Tokenizer as Fast

    if (folder / "tokenizer.json").is_file():
        found = Fast.from_file(str(folder / "tokenizer.json"))
        found.no_padding()
        found.no_truncation()
        return found
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


def new_pipeline(parts: Mapping[str, object], scheduler: Scheduler) -> Pipeline:
    """A StableDiffusionPipeline over `parts` (vae, text_encoder, tokenizer, unet)."""
    with lean_diffusers():
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        return StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def new_xl_pipeline(parts: Mapping[str, object], scheduler: Scheduler) -> Pipeline:
    """A StableDiffusionXLPipeline over `parts` (as above, and text_encoder_2, tokenizer_2)."""
    with lean_diffusers():
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
