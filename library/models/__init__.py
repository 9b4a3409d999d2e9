"""Base models. `open_family` recognises one; a further family is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.models.family import ModelFamily

FAMILIES = {
    "sd": "library.models.stable_diffusion.StableDiffusion",
    "sdxl": "library.models.stable_diffusion_xl.StableDiffusionXL",
}


def open_family(
    path: str,
    *,
    v2: bool,
    v_parameterization: bool,
    vae: str | None,
    clip_skip: int | None,
    max_token_length: int | None,
    zero_terminal_snr: bool = False,
    weighted_captions: bool = False,
    only: str | None = None,
) -> ModelFamily:
    """The family of the base model at `path`: a diffusers folder, a single file or a hub id.

    Reads headers and small configurations only. v2, v_parameterization: what the user says the model is, checked
    against it. vae: a folder or file of another VAE. clip_skip: 1 is the text encoder's last layer. max_token_length:
    75, 150 or 225 tokens of a caption. zero_terminal_snr: rescale the noise schedule to end in pure noise.
    weighted_captions: whether brackets weigh words. only: the one family that is wanted. Raises UserError where the
    model is not found, not supported, or not as said.
    """
    from library.config.registry import load_path
    from library.errors import UserError
    from library.models.checkpoints.detect import TITLES
    from library.models.checkpoints.opening import open_base_model

    base = open_base_model(path)
    if only is not None and base.kind != only:
        raise UserError(f"{path} is {TITLES[base.kind]}, where {TITLES[only]} is wanted; train_network.py takes both")
    for name, part in base.parts.items():
        if name != "vae" or vae is None:
            part.entries()  # a missing or damaged file is found now, not when all images are encoded
    family: ModelFamily = load_path(FAMILIES[base.kind], where="FAMILIES")(
        base,
        v2=v2,
        v_parameterization=v_parameterization,
        vae=vae,
        clip_skip=clip_skip,
        max_token_length=max_token_length,
        zero_terminal_snr=zero_terminal_snr,
        weighted_captions=weighted_captions,
    )
    return family
