"""--fs in the prompts of samples: a shift of the levels for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from library.models.family import ModelFamily
from library.models.opening import open_family
from library.sampling.prompts import SamplePrompt
from library.sampling.render import EncodedPrompts, render

TOKENS = 16


def loaded(folder: Path, **options: Any) -> ModelFamily:
    family = open_family(str(folder), options=options)
    family.components.load_all(family.PARTS, torch.float32, "cpu")
    return family


def drawn(family: ModelFamily, pipeline: Any, **settings: Any) -> Image.Image:
    item = SamplePrompt(prompt="emoji of cat", width=64, height=64, sample_steps=3, scale=1.0, **settings)
    texts = EncodedPrompts(family, [item.prompt, ""])
    return render(*(family, pipeline, texts, item), sampler="euler", generator=torch.Generator().manual_seed(3))


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, of 255 levels."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def test_a_sample_is_diffusers_with_that_shift(tiny_flux: Path) -> None:
    """In place of the shift by the image's size; the next sample has that again."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    family = loaded(tiny_flux, t5xxl_max_token_length=TOKENS)
    theirs = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        *("emoji of cat",),
        num_inference_steps=3,
        guidance_scale=3.5,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=TOKENS,
    ).images[0]
    pipeline = family.pipeline()
    before = drawn(family, pipeline)
    assert difference(drawn(family, pipeline, flow_shift=6.0), expected) <= 1, "of rounding"
    assert difference(before, expected) > 5
    assert drawn(family, pipeline) == before


@pytest.mark.parametrize("name", ["tiny_anima", "tiny_z_image"])
def test_the_models_own_shift_is_3(name: str, request: pytest.FixtureRequest) -> None:
    family = loaded(request.getfixturevalue(name))
    pipeline = family.pipeline()
    usual, same, none = (drawn(family, pipeline, flow_shift=shift) for shift in (None, 3.0, 1.0))
    assert difference(usual, same) <= 1, "of rounding"
    assert difference(usual, none) > 1


def test_models_of_noise_have_none(tmp_path: Path) -> None:
    """The flag has no effect, and is said to have none (`warn_of_idle_flags`)."""
    from tests.conftest import BASE

    family = loaded(BASE)
    item = {"prompt": "emoji of cat", "width": 64, "height": 64, "sample_steps": 2, "seed": 1}
    images = [
        render(
            *(family, family.pipeline(), EncodedPrompts(family, ["emoji of cat", ""])),
            SamplePrompt(**item, flow_shift=shift),  # type: ignore[arg-type]
            sampler="ddim",
            generator=torch.Generator().manual_seed(0),
        )
        for shift in (None, 3.0)
    ]
    assert images[0] == images[1]
