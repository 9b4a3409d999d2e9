"""A made-up family that shares nothing with Stable Diffusion, to show that a family is one file and one line.

A transformer trained by flow matching, with separate query, key and value layers; a text encoder that gives as many
states as a text has bytes; latents of 8 pixels a cell in patches of 2 × 2, so sides are multiples of 16; a VAE with a
shift. `write` makes a folder of it with random weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from library.models.blocks import Blocks
from library.models.checkpoints.base_model import BaseModel, Folder, Part, read_json
from library.models.components import PartKind
from library.models.family import ModelFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.diffusion.flow import Flow
    from library.files.tensors import WeightsIndex

LAYERS = re.compile(r"blocks\.\d+\.(?:attn\.(?:to_q|to_k|to_v|to_out)|mlp\.(?:fc1|fc2))")
SIZES: dict[str, dict[str, int]] = {
    "vae": {"channels": 3},
    "transformer": {"channels": 3, "width": 32, "layers": 2, "text_width": 24},
    "text_encoder": {"width": 24, "layers": 1},
}


@cache
def _block_class(width: int) -> type[nn.Module]:
    """A transformer block: attention and an MLP, each on normalised inputs. All blocks of a model have one class."""
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
            q, k, v = (
                layer(x_BLD).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
            )
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BL[:, None, None, :])
            return self.to_out(found.transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.gelu(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn, self.mlp = Attention(), Mlp()

        def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
            x_BLD = x_BLD + self.attn(self.norm1(x_BLD), mask_BL)
            return x_BLD + self.mlp(self.norm2(x_BLD))

    return Block


def new_transformer(config: Mapping[str, Any]) -> nn.Module:
    """The denoiser, on the meta device."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Transformer(nn.Module):
        checkpoints = False

        def __init__(self) -> None:
            super().__init__()
            width, channels = config["width"], config["channels"]
            self.patches, self.texts = nn.Linear(4 * channels, width), nn.Linear(config["text_width"], width)
            self.places, self.time = nn.Linear(4, width), nn.Linear(width, width)
            self.blocks = nn.ModuleList(_block_class(width)() for _ in range(config["layers"]))
            self.last = nn.Linear(width, 4 * channels)

        def gradient_checkpointing_enable(self) -> None:
            self.checkpoints = True

        def forward(self, x_BCHW: Tensor, sigma_B: Tensor, texts_BLD: Tensor, mask_BL: Tensor) -> Tensor:
            height, width = (side // 2 for side in x_BCHW.shape[2:])
            tokens = nn.functional.pixel_unshuffle(x_BCHW, 2).flatten(2).mT
            rows, columns = torch.meshgrid(
                *(torch.arange(n, device=x_BCHW.device) / 8 for n in (height, width)), indexing="ij"
            )
            places = torch.stack([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1).flatten(0, 1)
            rates = torch.arange(1, self.time.in_features // 2 + 1, device=sigma_B.device)
            angles = sigma_B.float()[:, None] * rates * math.pi
            time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(x_BCHW.dtype))
            images = self.patches(tokens) + self.places(places.to(x_BCHW.dtype)) + time[:, None]
            hidden = torch.cat([images, self.texts(texts_BLD)], dim=1)
            seen = torch.ones(*images.shape[:2], dtype=torch.bool, device=mask_BL.device)
            mask = torch.cat([seen, mask_BL.bool()], dim=1)
            for block in self.blocks:
                if self.checkpoints and self.training:
                    hidden = checkpoint(block, hidden, mask, use_reentrant=False)
                else:
                    hidden = block(hidden, mask)
            found = self.last(hidden[:, : height * width]).mT.unflatten(2, (height, width))
            return nn.functional.pixel_shuffle(found, 2)

    with torch.device("meta"):
        return Transformer()


def new_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """On the meta device."""
    import torch
    from torch import nn

    class TextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(257, config["width"])
            self.blocks = nn.ModuleList(_block_class(config["width"])() for _ in range(config["layers"]))

        def gradient_checkpointing_enable(self) -> None:
            pass

        def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
            hidden = self.embedding(ids_BL)
            for block in self.blocks:
                hidden = block(hidden, mask_BL.bool())
            return hidden

    with torch.device("meta"):
        return TextEncoder()


def new_vae(config: Mapping[str, Any]) -> nn.Module:
    """Means of 8 × 8 pixels and back, mixed by 1 × 1 convolutions; on the meta device."""
    import torch
    from torch import nn

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Conv2d(3, config["channels"], 1), nn.Conv2d(config["channels"], 3, 1)

        def encode(self, pixels_BCHW: Tensor) -> Any:
            mean = self.into(nn.functional.avg_pool2d(pixels_BCHW, 8))
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.01)))

        def decode(self, latents_BCHW: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (nn.functional.interpolate(self.out(latents_BCHW), scale_factor=8.0),)

    with torch.device("meta"):
        return Vae()


class Toy(ModelFamily):
    """The family "toy"."""

    NAME, TITLE = "toy", "a toy model"
    PARTS: ClassVar[Mapping[str, PartKind]] = {
        "denoiser": PartKind(
            folder="transformer",
            title="transformer",
            new=f"{__name__}.new_transformer",
            section="unet",
            prefix="lora_unet",
            linear=LAYERS,
            blocks=Blocks((("down", SIZES["transformer"]["layers"]),), 0, lambda name: int(name.split(".")[1])),
        ),
        "vae": PartKind(folder="vae", title="VAE", new=f"{__name__}.new_vae"),
        "text_encoder": PartKind(
            folder="text_encoder",
            title="text encoder",
            new=f"{__name__}.new_text_encoder",
            section="text_encoder",
            prefix="lora_te",
            linear=LAYERS,
            layer=re.compile(r"blocks\.(\d+)\..*"),
        ),
    }
    base_model_version = "toy"
    architecture = "toy-v1"
    implementation = "toy"
    native_resolution = 64
    size_divisor = 16

    def __init__(self, base: BaseModel, *, vae: str | None = None, max_token_length: int | None = None) -> None:
        from library.diffusion.latents import LatentSpace

        super().__init__(base, vae=vae)
        self.latents = LatentSpace(channels=SIZES["vae"]["channels"], factor=8, scaling=0.5, shift=0.25)
        self.token_limit = max_token_length or 75

    @classmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """A folder that says so."""
        return isinstance(content, Folder) and content.pipeline == "ToyPipeline"

    @classmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        """A folder for each part."""
        from library.models.checkpoints.folder import entries_in

        def part(name: str, folder: Path) -> Part:
            return Part(read_json(folder / "config.json"), f"the {name} in {folder}", lambda: entries_in(folder))

        return BaseModel(
            cls.NAME, path, location, {name: part(name, location / kind.folder) for name, kind in cls.PARTS.items()}
        )

    @cached_property
    def process(self) -> Flow:
        """Flow matching, shifted towards noise."""
        from library.diffusion.flow import Flow

        return Flow(shift=2.0)

    def text_fingerprint(self) -> str:
        from library.models.fingerprint import combined

        return combined({"weights": self.components.fingerprint("text_encoder"), "tokens": self.token_limit})

    def count_tokens(self, caption: str) -> int:
        return len(caption.encode())

    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden_states": [B, L, D], "mask": [B, L]}, L the bytes of the longest caption and one."""
        import torch

        encoder: Any = self.components["text_encoder"]
        rows = [[*caption.encode()[: self.token_limit], 256] for caption in captions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        ids = ids.to(encoder.embedding.weight.device)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device)
        return {"hidden_states": encoder(ids, mask), "mask": mask}

    def fused_name(self, part: str, name: str) -> str:
        """The transformer's query, key and value are one layer in files."""
        return re.sub(r"to_[qkv]$", "qkv", name) if part == "denoiser" and re.search(r"to_[qkv]$", name) else ""

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The velocity; levels are σ in 0 … 1."""
        import torch

        denoiser: Any = self.components["denoiser"]
        states = condition["hidden_states"]
        if not torch.is_autocast_enabled(noisy_BCHW.device.type):
            dtype = denoiser.last.weight.dtype
            noisy_BCHW, states = noisy_BCHW.to(dtype), states.to(dtype)
        return denoiser(noisy_BCHW, level_B, states, condition["mask"])

    def denoiser_blocks(self) -> Iterable[nn.Module]:
        denoiser: Any = self.components["denoiser"]
        return denoiser.blocks

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"positive": positive, "negative": negative}

    def pipeline(self) -> Any:
        return _Pipeline(self)


class _Pipeline:
    """Called as diffusers' are."""

    def __init__(self, family: Toy) -> None:
        self.family, self.scheduler = family, family.process.scheduler("euler")

    def set_progress_bar_config(self, **settings: object) -> None:
        pass

    def __call__(
        self,
        positive: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        num_inference_steps: int,
        guidance_scale: float = 7.5,
        width: int,
        height: int,
        generator: Any,
        output_type: str,
    ) -> Any:
        import torch

        assert output_type == "latent"
        assert width % 16 == height % 16 == 0, "the sides that the family asks for"
        family = self.family
        device = next(family.components["denoiser"].parameters()).device
        latents = torch.randn(1, family.latents.channels, height // 8, width // 8, generator=generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.scheduler.timesteps:
            level = (t / family.process.steps).float().expand(1)
            wanted, unwanted = (family.predict(latents, level, text).float() for text in (positive, negative))
            velocity = unwanted + guidance_scale * (wanted - unwanted)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)


def write(folder: Path) -> Path:
    """A model with random weights; the same bits each time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}), encoding="utf-8")
    makers = {"vae": new_vae, "transformer": new_transformer, "text_encoder": new_text_encoder}
    generator = torch.Generator().manual_seed(0)
    for name, make in makers.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(SIZES[name]), encoding="utf-8")
        states = {}
        for key, parameter in make(SIZES[name]).named_parameters():
            scale = 0.3 if "embedding" in key else parameter.shape[-1] ** -0.5
            states[key] = torch.randn(parameter.shape, generator=generator) * scale
            if "norm" in key:
                states[key] = torch.ones(parameter.shape) if key.endswith("weight") else torch.zeros(parameter.shape)
        save_file(states, folder / name / "model.safetensors")
    return folder
