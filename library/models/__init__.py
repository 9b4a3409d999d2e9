"""Base models. `opening.open_family` opens one; a new family is one file and one line here."""

from __future__ import annotations

FAMILIES = {
    "sd": "library.models.stable_diffusion.StableDiffusion",
    "sdxl": "library.models.stable_diffusion_xl.StableDiffusionXL",
    "flux": "library.models.flux.Flux1",
    "chroma": "library.models.chroma.Chroma",
    "anima": "library.models.anima.Anima",
    "z_image": "library.models.z_image.ZImage",
    "flux2": "library.models.flux2.Flux2Klein",
    "sd3": "library.models.stable_diffusion_3.StableDiffusion3",
}
