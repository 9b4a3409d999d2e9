"""Z-Image, base and Turbo: a single-stream transformer trained by flow matching, Qwen3-4B, the autoencoder of FLUX.1.

Tongyi-MAI 2025 (arXiv 2511.22699), github.com/Tongyi-MAI/Z-Image. Texts are written as a user's turn of a chat, and the
transformer gets the states before Qwen3's last layer, of as many tokens as there are. Turbo has the shapes and names of
the base, and is distilled to eight steps without guidance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.files.tensors import WeightsIndex
from library.gpu import device_of, to_device
from library.models.blocks import Blocks
from library.models.checkpoints.adapter_file import WrittenNaming
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import is_z_image
from library.models.checkpoints.flux_files import autoencoder_config
from library.models.checkpoints.part_files import with_part
from library.models.checkpoints.z_image_files import PARTS, configurations, open_z_image
from library.models.checkpoints.z_image_names import block_number
from library.models.components import PartKind
from library.models.family import Rendering
from library.models.flow_matching import (
    Fit,
    FlowMatching,
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
from library.models.latent_diffusion import VAE
from library.models.text import qwen
from library.models.text.language import never_in_fp16, padded, read_qwen3_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.diffusion.flow import Flow
    from library.files.json_text import Config
    from library.models.modules import Tokenizer

_LINEAR = re.compile(r"layers\.\d+\.(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123])")
_MORE = re.compile(
    r"layers\.\d+\.adaLN_modulation\.0|"
    r"(?:noise|context)_refiner\.\d+\.(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
)
_LAYERS, _EXPECTED = 30, {"unet": 210}  # of the true size
_SHIFT = 3.0  # of the levels of samples
_TRAINED_SHIFT = 2.0  # of those that are drawn in training, as musubi-tuner's documents have it


class ZImage(FlowMatching):
    """The family "z_image". Its members are described in `library.models.family.ModelFamily`."""

    NAME, TITLE = "z_image", "a Z-Image model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new="library.models.modules.new_z_image_transformer",
            section="unet",
            prefix="lora_unet",
            linear=_LINEAR,
            more=_MORE,
            choices={
                "attn-only": re.compile(r".*\.attention\..*"),
                "attn-qv": re.compile(r".*\.attention\.to_[qv]"),
            },
            overflows_fp16=True,
        ),
        "vae": VAE,
        "text_encoder": qwen.FROZEN,
    }
    UNUSABLE: ClassVar[Mapping[str, str]] = plain_noise("kohya's script for Z-Image, of musubi-tuner,")
    TIMESTEP_SAMPLING = "shift"
    FILE_NAMING: ClassVar[WrittenNaming] = "diffusers"
    NAMES_EVERY_KIND = True
    base_model_version = "z_image"
    architecture = "Z-Image"
    implementation = "https://github.com/Tongyi-MAI/Z-Image"
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
        turbo: bool | None = None,
    ) -> None:
        base, own = with_flux_autoencoder(base, vae, ae)
        if qwen3:
            base = with_part(base, "text_encoder", PARTS["text_encoder"], qwen3, option="qwen3")
        refuse_missing(base, "Z-Image", _WANTED)
        base = qwen.with_own_tokenizer(base, qwen3_tokenizer_path)
        super().__init__(base, vae=own)
        self._base, self._config = base, base.parts["denoiser"].config
        refuse_misfits(base, _fits(base))
        self._tokens = qwen3_max_token_length
        self.token_limit = max(1, qwen3_max_token_length - qwen.TOKENS_BEFORE)
        self._shift = _TRAINED_SHIFT if discrete_flow_shift is None else discrete_flow_shift
        self.latents = latent_space_of(base.parts["vae"].config)
        self.distilled = called(base, "turbo") if turbo is None else turbo

    @property
    def settings(self) -> dict[str, object]:
        return {"discrete_flow_shift": self._shift, "qwen3_max_token_length": self._tokens}

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """The names of its blocks and its text's embedding, or a folder of a ZImagePipeline."""
        return is_z_image(content)

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        return open_z_image(path, location, kind=cls.NAME)

    @classmethod
    def usual_configs(cls) -> Mapping[str, Config]:
        return {**configurations(), "vae": autoencoder_config()}

    @cached_property
    def process(self) -> Flow:
        """Flow matching. Samples are shifted by 3, whatever their size."""
        return flow_of(same_shift(_SHIFT), self._shift)

    # -- texts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        own = {"source": "Qwen/Qwen3-4B", "of": self.path, "model": "Z-Image"}
        rows = self._base.parts["text_encoder"].config["vocab_size"]
        return read_qwen3_tokenizer(self._base.tokenizer, rows=rows, words=qwen.WORDS, **own)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined, folder_fingerprint

        assert self._tokenizer is not None
        return combined(
            {
                "template": [qwen.BEFORE, qwen.BEHIND],
                "tokenizer": folder_fingerprint(self._base.tokenizer),
                "tokens": self._tokens,
                "weights": self.components.fingerprint("text_encoder"),
            }
        )

    def count_tokens(self, caption: str) -> int:
        """Those of the caption, without the words of the chat around it."""
        return len(self._tokenizer.encode(caption).ids)

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, L, D], "mask": [B, L]}: the states before Qwen3's last layer, of the longest caption L.

        Behind those of a shorter one are zeros, and zeros in the mask: the transformer gets each without them.
        """
        import torch

        encoder: Any = self.components["text_encoder"]
        rows = [self._tokenizer.encode(f"{qwen.BEFORE}{one}{qwen.BEHIND}").ids[: self._tokens] for one in captions]
        ids, mask = (to_device(table, device_of(encoder)) for table in padded(rows))
        # without a mask: a token's state depends on those before it alone, and padding follows them
        with torch.no_grad(), never_in_fp16(ids.device):
            states = encoder(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-2]
        return {"hidden_states": states * mask[..., None].to(states.dtype), "mask": mask}

    # -- the network

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity, [B, C, h, w]; levels are σ in 0 … 1. The network is told 1 - σ, in float32, and its answer is
        the opposite of the velocity. Each sample has the text's own length: the network fills up itself."""
        import torch

        transformer: Any = self.components["denoiser"]
        states, lengths = condition["hidden_states"], _lengths(condition["mask"])
        noisy_BCHW, states = in_its_dtype(transformer.cap_embedder[1].weight, noisy_BCHW, states)
        with never_in_fp16(noisy_BCHW.device):  # values inside reach 3e5
            found = transformer(
                list(noisy_BCHW[:, :, None].unbind()),
                1 - level_B.float(),
                [text[:length] for text, length in zip(states, lengths, strict=True)],
                return_dict=False,
            )[0]
        return -torch.stack(found)[:, :, 0]

    def denoiser_blocks(self) -> list[nn.Module]:
        """The refiners of image and text, and the layers that run on both."""
        transformer: Any = self.components["denoiser"]
        return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]

    # -- adapters

    def blocks(self) -> Blocks:
        return Blocks((("block", self._config.get("n_layers", _LAYERS)),), 0, block_number)

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        return _EXPECTED if self._config.get("n_layers", _LAYERS) == _LAYERS else None

    def third_party_views(self) -> tuple[Any, Any]:
        """No text encoder: it is not trained."""
        return None, self.components.get("denoiser")

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """Usual settings of the base's users, or of Turbo: in eight steps, without a negative prompt."""
        return Rendering(steps=8, scale=1.0, compared=1.0) if self.distilled else Rendering(steps=30, scale=4.0)


_WANTED = {
    "text_encoder": "--qwen3, the file of the text encoder Qwen3-4B",
    "vae": "--ae, the file of FLUX.1's autoencoder",
}


def _lengths(mask_BL: Tensor) -> list[int]:
    """The number of each text's tokens. A mask without contents, as estimates of memory have, is taken to be full."""
    import torch

    if type(mask_BL) is not torch.Tensor:
        return [mask_BL.shape[1]] * len(mask_BL)
    lengths: list[int] = mask_BL.sum(dim=1).int().tolist()
    return lengths


def _fits(base: BaseModel) -> list[Fit]:
    """What the transformer needs of the text encoder and the autoencoder."""
    transformer, encoder, vae = (base.parts[part].config for part in ("denoiser", "text_encoder", "vae"))
    return [
        Fit("transformer", "states with", transformer.get("cap_feat_dim", 2560), encoder.get("hidden_size")),
        Fit("transformer", "latents with", transformer.get("in_channels", 16), vae.get("latent_channels")),
    ]
