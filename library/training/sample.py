"""Images drawn with the network, to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library import rng
from library.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.models.family import ModelFamily

GUIDANCE_SCALE = 4.0


def draw(family: ModelFamily, prompts: Sequence[str], *, size: tuple[int, int], steps: int, seed: int) -> list[Image]:
    """One image of `size` (width, height) per prompt, with the network as it stands; all parts must be loaded.

    Every prompt has its own noise, keyed by its text: the same prompt gives the same image, whatever else is drawn.
    """
    pipeline = family.sampling_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image] = []
    for prompt in bar(prompts, desc="drawing", unit="image"):
        result = pipeline(
            # encoded as in training: long prompts and clip_skip included
            prompt_embeds=family.encode_prompts([prompt])["hidden_states"],
            negative_prompt_embeds=family.encode_prompts([""])["hidden_states"],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            width=size[0],
            height=size[1],
            generator=rng.torch_generator(seed, prompt, "sample"),
        )
        images += result.images
    return images


def compare(
    path: Path,
    family: ModelFamily,
    without: Callable[[], AbstractContextManager[None]],
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    seed: int,
) -> None:
    """A PNG with one column per prompt: above without the LoRA, below with it, from the same noise.

    `without()` is a context in which the network has no effect.
    """
    with torch.no_grad():
        with without():
            plain = draw(family, prompts, size=size, steps=steps, seed=seed)
        changed = draw(family, prompts, size=size, steps=steps, seed=seed)
    _save_grid(path, prompts, [("without the LoRA", plain), ("with the LoRA", changed)])


def _save_grid(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image]]]) -> None:
    import textwrap

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cell = 1.7  # inches
    figure = Figure(figsize=(cell * len(columns) + 0.4, cell * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for r, (label, images) in enumerate(rows):
        for c, image in enumerate(images):
            axes = grid[r][c]
            axes.imshow(image, interpolation="nearest" if image.width < 128 else "antialiased")
            axes.set(xticks=[], yticks=[])
            if r == 0:
                axes.set_title(textwrap.fill(columns[c], 22), fontsize=7)
            if c == 0:
                axes.set_ylabel(label, fontsize=8)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
