"""The options of models that are trained by flow matching, with text encoders and VAE in files of their own: Stable
Diffusion 3, FLUX.1, FLUX.2 klein, Chroma, Anima and Z-Image.

Names are kohya's. `library.models.opening` refuses them for a model of another family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import BadValue, option
from library.errors import UserError

# Values that GUIs write into the configurations of every model: for another family they ask for nothing
_WRITTEN_ANYWAY: dict[str, tuple[object, ...]] = {
    "discrete_flow_shift": (1.0, 3.0, 3.1582, 5.0, 6.0),
    "guidance_scale": (3.5,),
    "model_type": ("flux",),
    "model_prediction_type": ("raw",),
    "t5xxl_max_token_length": (256,),
    "qwen3_max_token_length": (512,),
    "t5_max_token_length": (512,),
    **dict.fromkeys(("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"), (0.0,)),
}
_VERSIONS = ("klein-base-4b", "klein-4b", "klein-base-9b", "klein-9b")
_WRONG_TARGETS = ("sigma_scaled", "additive")


def read_prediction_type(word: str) -> str:
    """ "raw"; BadValue with the reason for kohya's other two."""
    if word in _WRONG_TARGETS:
        raise BadValue(
            f"{word} changes the prediction and compares it with the target of an unchanged one, so the model learns "
            "something else than the velocity that samplers need; raw is right"
        )
    if word != "raw":
        raise BadValue(f"'{word}' is unknown; the only one is raw")
    return word


def read_model_version(word: str) -> str:
    """musubi-tuner's name of a version of FLUX.2 klein; BadValue with the reason for dev."""
    if word == "dev":
        raise BadValue(
            "FLUX.2 dev is not supported: 32 billion parameters, with a text encoder of 24 billion (Mistral 3); this "
            f"version trains {', '.join(_VERSIONS)}"
        )
    if word not in _VERSIONS:
        raise BadValue(f"'{word}' is unknown; known are {', '.join(_VERSIONS)}")
    return word


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether this value of an option stands in configurations of models that it is not for, as a flag that is off."""
    return value is False or value in _WRITTEN_ANYWAY.get(name, ())


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Stable Diffusion 3, FLUX.1, FLUX.2 klein, Chroma, Anima and Z-Image"""

    model_type: Literal["flux", "chroma"] | None = option(
        None, help="what the base is, flux or chroma: checked against the file, which says so itself"
    )
    clip_l: str | None = option(None, help="the CLIP-L text encoder, where the base has none: a file or a folder")
    clip_g: str | None = option(None, help="the CLIP-G text encoder, where the base has none: a file or a folder")
    t5xxl: str | None = option(None, help="the T5-XXL text encoder, where the base has none: a file or a folder")
    ae: str | None = option(
        None, help="the autoencoder, where the base has none: a file or a folder; the same as --vae"
    )
    qwen3: str | None = option(None, help="the text encoder Qwen3 of FLUX.2, Anima or Z-Image: a file or a folder")
    llm_adapter_path: str | None = option(
        None, help="Anima's LLM adapter, where the transformer's file has none: a file or a folder"
    )
    t5_tokenizer_path: str | None = option(
        None, help="T5's tokenizer, where the base is no folder that has it: a folder with tokenizer.json"
    )
    qwen3_tokenizer_path: str | None = option(
        None,
        help="Qwen3's tokenizer, where neither the base nor --qwen3 is a folder that has it: a folder with "
        "tokenizer.json, or with vocab.json and merges.txt (ours)",
    )
    qwen3_max_token_length: int = option(512, minimum=1, help="Qwen3's tokens of a caption of FLUX.2, Anima or Z-Image")
    t5_max_token_length: int = option(512, minimum=2, maximum=512, help="T5's tokens of a caption of Anima")
    t5xxl_max_token_length: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="T5's tokens of a caption (default: 512; of FLUX.1 schnell and Stable Diffusion 3 256)",
    )
    apply_lg_attn_mask: bool = option(False, help="hide the padding of CLIP-L and CLIP-G from themselves")
    apply_t5_attn_mask: bool = option(
        False,
        help="hide T5's padding from T5, and of FLUX.1 from the transformer; for Chroma that is done in any case",
    )
    clip_l_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, help="share of the captions that CLIP-L says nothing about: zeros in its place"
    )
    clip_g_dropout_rate: float = option(0.0, minimum=0, maximum=1, help="the same of CLIP-G, independently")
    t5_dropout_rate: float = option(0.0, minimum=0, maximum=1, help="the same of T5, independently")
    guidance_scale: float = option(
        1.0,
        minimum=0,
        help="the guidance that FLUX.1 dev is told in training; samples are rendered with 3.5 or their --g",
    )
    discrete_flow_shift: float | None = option(
        None,
        minimum=0,
        help="shift of the noise levels with --timestep_sampling sigma and shift (default: 3, of Anima 1, of "
        "Z-Image 2)",
    )
    turbo: bool | None = option(
        None,
        help="whether a base of Z-Image or Stable Diffusion 3.5 is a Turbo, distilled to a few steps (default: if it "
        "is called so) (ours)",
    )
    model_version: str | None = option(
        None,
        read=read_model_version,
        help="which FLUX.2 klein the base is: klein-base-4b, klein-base-9b, or klein-4b, klein-9b, which are distilled "
        "to four steps (default: as its folder says, or its file is called) (ours)",
    )
    model_prediction_type: str = option(
        "raw", read=read_prediction_type, help="what the loss compares: raw, the predicted velocity with the true one"
    )

    def __post_init__(self) -> None:
        if self.discrete_flow_shift == 0:
            raise UserError("--discrete_flow_shift must be above 0; 1 shifts nothing")
