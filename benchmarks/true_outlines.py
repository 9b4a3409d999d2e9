"""Folders of Stable Diffusion 1.5, XL, 3.5 medium and 3.5 large, FLUX.1 dev, FLUX.2 klein, Chroma, Anima and Z-Image at
their true sizes: headers alone.

The files are sparse: they have the length that their headers state and take no room on disk. Everything that reads
shapes only works with them: `--dry_run` and `--fit` up to loading, and estimates of memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.files.json_text import Config


def write(folder: Path, family: str) -> Path:
    """A diffusers folder of the `family`, made once: "sd15", "sdxl", "sd35m", "sd35l", "flux", "flux2", "flux2_9b",
    "chroma", "anima" or "z_image"."""
    if (folder / "scheduler").exists():
        return folder
    config = _configurations(family)
    for part, new in _makers(family).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config[part]), encoding="utf-8")
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        _write_header(folder / part / f"{stem}.safetensors", _in_files(new(config[part])))
    if pipeline := _PIPELINES.get(family):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
        _write_tokenizer(folder / _TOKENIZERS.get(family, "tokenizer"))
    if family == "anima":
        for tokenizer in ("tokenizer", "t5_tokenizer"):
            _write_tokenizer(folder / tokenizer)
    (folder / "scheduler").mkdir()
    text = json.dumps({**config.get("scheduler", {}), "prediction_type": "epsilon"})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    return folder


_PIPELINES = {
    "flux": "FluxPipeline", "flux2": "Flux2KleinPipeline", "flux2_9b": "Flux2KleinPipeline", "chroma": "ChromaPipeline",
    "z_image": "ZImagePipeline", "sd35m": "StableDiffusion3Pipeline", "sd35l": "StableDiffusion3Pipeline",
}  # fmt: skip
_TOKENIZERS = {"flux": "tokenizer_2", "sd35m": "tokenizer_3", "sd35l": "tokenizer_3"}  # where T5's lies
# What the sizes of FLUX.2 klein have otherwise than the one in the asset, with Qwen3-4B or Qwen3-8B
_KLEIN: dict[str, dict[str, dict[str, int]]] = {
    "flux2": {},
    "flux2_9b": {
        "transformer": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
                        "joint_attention_dim": 12288},
        "text_encoder": {"hidden_size": 4096, "intermediate_size": 12288},
    },
}  # fmt: skip
_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
"""What Stable Diffusion 3.5 large has that medium has not."""


def _configurations(family: str) -> dict[str, Any]:
    from library.models.checkpoints.base_model import ASSETS
    from library.models.checkpoints.sd3.files import configurations

    if family in ("sd35m", "sd35l"):
        third = configurations()
        third["transformer"] |= _LARGE if family == "sd35l" else {}
        return third

    def asset(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
        return found

    config = asset({"sd15": "sd1", "flux2_9b": "flux2"}.get(family, family))
    if family in ("z_image", "chroma"):
        of_flux = asset("flux")
        config = {"text_encoder": of_flux["text_encoder_2"], **config, "vae": of_flux["vae"]}
    if family in _KLEIN:
        config["text_encoder"] = asset("z_image")["text_encoder"]
        for part, sizes in _KLEIN[family].items():
            config[part] |= sizes
    return config


def _in_files(module: nn.Module) -> dict[str, Tensor]:
    """What files have of a module: parameters, each once, and the buffers that are saved."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: tensor for name, tensor in module.state_dict().items() if name in once}


def _makers(family: str) -> Mapping[str, Callable[[Config], nn.Module]]:
    """What makes each part, by the part's folder."""
    from library.models import modules

    stable = {"vae": modules.new_vae, "text_encoder": modules.new_text_encoder}
    third = {
        **stable,
        "transformer": modules.new_sd3_transformer,
        "text_encoder_2": modules.new_projected_text_encoder,
        "text_encoder_3": modules.new_t5_encoder,
    }
    klein = {
        "vae": modules.new_flux2_vae,
        "text_encoder": modules.new_qwen3_encoder,
        "transformer": modules.new_flux2_transformer,
    }
    by_family: Mapping[str, Mapping[str, Callable[[Config], nn.Module]]] = {
        "sd15": {**stable, "unet": modules.new_unet},
        "sdxl": {**stable, "unet": modules.new_unet, "text_encoder_2": modules.new_projected_text_encoder},
        "sd35m": third,
        "sd35l": third,
        "flux": {**stable, "transformer": modules.new_flux_transformer, "text_encoder_2": modules.new_t5_encoder},
        "flux2": klein,
        "flux2_9b": klein,
        "chroma": {
            "vae": modules.new_vae,
            "text_encoder": modules.new_t5_encoder,
            "transformer": modules.new_chroma_transformer,
        },
        "anima": {
            "vae": modules.new_qwen_vae,
            "text_encoder": modules.new_qwen3_encoder,
            "transformer": modules.new_anima_transformer,
            "text_conditioner": modules.new_llm_adapter,
        },
        "z_image": {
            "vae": modules.new_vae,
            "text_encoder": modules.new_qwen3_encoder,
            "transformer": modules.new_z_image_transformer,
        },
    }
    return by_family[family]


def _write_tokenizer(folder: Path) -> None:
    """One with a token for each word: the number of states can depend on it, but not on which they are."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir()
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    words = {word: place for place, word in enumerate(("<pad>", "</s>", "<unk>", *chat))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_header(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .safetensors in bf16 that ends in a hole of the tensors' size."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
