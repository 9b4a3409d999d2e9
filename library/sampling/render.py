"""Renders images with the network: samples during training, and a comparison at its end."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library import rng
from library.diffusion.flow import Flow
from library.errors import UserError
from library.files.atomic import replacing
from library.gpu import kept_random_state
from library.progress import bar
from library.sampling import files as sample_files
from library.sampling.prompts import SamplePrompt, SampleTimes

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.diffusion.process import Process
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


class EncodedPrompts:
    """The text encoders' states for prompts, encoded as in training, including long prompts and clip_skip.

    Prompts are encoded again each time, because the encoder may be trained; `keep` stores the states of one that will
    be released.
    """

    def __init__(self, family: ModelFamily, texts: Iterable[str]) -> None:
        """`texts`: all texts that will be needed."""
        self._family, self._texts = family, tuple(dict.fromkeys(texts))
        self._kept: dict[str, dict[str, Tensor]] = {}

    def keep(self, encode: Callable[[list[str]], dict[str, Tensor]]) -> None:
        """Encode all of them now, with `encode`: the text encoder is about to be released."""
        with torch.no_grad():
            self._kept = {text: encode([text]) for text in self._texts}

    def __call__(self, prompt: str, negative: str) -> dict[str, Tensor]:
        """The arguments of the family's pipeline for the two."""
        return self._family.pipeline_arguments(*map(self._encoded, (prompt, negative)))

    def _encoded(self, text: str) -> dict[str, Tensor]:
        return self._kept[text] if self._kept else self._family.encode_prompts([text])


def check_sampler(sampler: str) -> None:
    """`UserError` if it needs a package that is absent."""
    if sampler == "lms" and importlib.util.find_spec("scipy") is None:
        raise UserError("--sample_sampler lms needs the package 'scipy', which is not installed: pip install scipy")


def render(
    family: ModelFamily,
    pipeline: Any,
    encode: Callable[[str, str], dict[str, Tensor]],
    item: SamplePrompt,
    *,
    sampler: str,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Image:
    """Render one image with the current weights; `pipeline` is the `family`'s. All randomness is the generator's.

    Sides are rounded down to the family's `size_divisor`.
    """
    width, height = (side - side % family.size_divisor for side in (item.width, item.height))
    usual, told = family.rendering, {}
    if usual.guidance is not None:
        told["embedded_guidance"] = usual.guidance if item.guidance_scale is None else item.guidance_scale
    with torch.no_grad():
        with _solver(pipeline, family.process, item, sampler), autocast():
            latents = pipeline(
                **encode(item.prompt, item.negative_prompt),
                num_inference_steps=usual.steps if item.sample_steps is None else item.sample_steps,
                guidance_scale=usual.scale if item.scale is None else item.scale,
                width=width,
                height=height,
                generator=generator,
                output_type="latent",
                **told,
            ).images
        pixels = family.decode_latents(latents)
    return to_image(pixels[0])


@contextmanager
def _solver(pipeline: Any, process: Process, item: SamplePrompt, sampler: str) -> Iterator[None]:
    """A context in which the pipeline has the prompt's sampler, and its shift where the model has one (--fs)."""
    own = {"scheduler": pipeline.scheduler}
    if item.flow_shift is not None and isinstance(process, Flow):
        own["process"], process = process, replace(process, shift=item.flow_shift)
        pipeline.process = process
    pipeline.scheduler = process.scheduler(item.sample_sampler or sampler)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(pipeline, name, value)


def to_image(pixels_CHW: Tensor) -> Image:
    """Pixels in [-1, 1], [3, H, W], as an image of 8 bits."""
    from PIL import Image

    shares = (pixels_CHW.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu()
    return Image.fromarray((shares.numpy() * 255).round().astype("uint8"))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The samples of a run: called with the number of steps done, it renders those that are due."""

    times: SampleTimes
    family: ModelFamily
    network: nn.Module
    at: Callable[[float], AbstractContextManager[None]]  # the network at another strength
    encode: Callable[[str, str], dict[str, Tensor]]
    vae_dtype: torch.dtype  # of the VAE, which is loaded for the samples and released again if it is not in memory
    autocast: Callable[[], AbstractContextManager[object]]
    device: torch.device
    show: Callable[..., None]  # (name, image, *, caption, step): beside the curves
    folder: Path
    name: str | None  # --output_name
    seed: int
    since: float  # when the run began, in seconds since 1970
    steps_per_epoch: int

    def __call__(self, step: int) -> None:
        """Render the samples due after `step` steps into `folder`, with kohya's names. Training is not affected."""
        moment = self._moment(step)
        if moment is None:
            return
        parts = self.family.components
        lacks_vae = "vae" not in parts
        if lacks_vae:
            parts.load("vae", self.vae_dtype, self.device)
        try:
            # a third party's network may draw random numbers
            with rng.without_dropout(self.network), kept_random_state(self.device):
                self._draw(step, moment)
        finally:
            if lacks_vae:
                parts.release("vae")

    def is_due(self, step: int) -> bool:
        """Whether samples are rendered after this step."""
        return self._moment(step) is not None

    def _moment(self, step: int) -> str | None:
        return self.times.due(step, steps_per_epoch=self.steps_per_epoch)

    def _draw(self, step: int, moment: str) -> None:
        pipeline = self.family.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for number, item in enumerate(bar(self.times.prompts, desc="samples", unit="image")):
            generator = rng.torch_generator(self.seed, number, "sample")
            if item.seed is not None:
                generator = torch.Generator().manual_seed(item.seed)
            with self.at(item.multiplier):
                image = render(
                    self.family,
                    pipeline,
                    self.encode,
                    item,
                    sampler=self.times.sampler,
                    generator=generator,
                    autocast=self.autocast,
                )
            with replacing(self.folder / sample_files.file_name(self.name, moment, number, item.seed)) as beside:
                image.save(beside, format="PNG")
            self.show(f"sample_{number}", image, caption=item.prompt, step=step)
        self._over_time()
        logger.info("rendered %d samples into %s", len(self.times.prompts), self.folder)

    def _over_time(self) -> None:
        """Write one picture for each prompt, of all its samples so far."""
        found = sample_files.find(self.folder, self.name, since=self.since)
        for number, item in enumerate(self.times.prompts):
            path = self.folder / f"{self.name or 'last'}_over_time_{number:02d}.png"
            if mine := [sample for sample in found if sample.prompt == number]:
                sample_files.draw_over_time(path, mine, prompt=item.prompt)


def draw(
    family: ModelFamily,
    encode: Callable[[str, str], dict[str, Tensor]],
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    seed: int,
) -> list[Image]:
    """One image of `size` (width, height) per prompt, with the current weights; denoiser and VAE must be loaded.

    Every prompt has its own noise, keyed by its text: a prompt's image does not depend on the other prompts.
    """
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    width, height = size
    return [
        render(
            family,
            pipeline,
            encode,
            SamplePrompt(
                prompt=prompt, width=width, height=height, sample_steps=steps, scale=family.rendering.compared
            ),
            sampler=family.process.samplers[0],
            generator=rng.torch_generator(seed, prompt, "sample"),
        )
        for prompt in bar(prompts, desc="drawing", unit="image")
    ]


def compare(
    path: Path,
    family: ModelFamily,
    encode: Callable[[str, str], dict[str, Tensor]],
    without: Callable[[], AbstractContextManager[None]],
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    seed: int,
    what: str = "the LoRA",
) -> None:
    """A PNG with one column per prompt: above without `what`, below with it, from the same noise.

    `without()` is a context in which the network has no effect.
    """
    with without():
        plain = draw(family, encode, prompts, size=size, steps=steps, seed=seed)
    changed = draw(family, encode, prompts, size=size, steps=steps, seed=seed)
    _save_grid(path, prompts, [(f"without {what}", plain), (f"with {what}", changed)])


def strengths(
    path: Path,
    family: ModelFamily,
    encode: Callable[[str, str], dict[str, Tensor]],
    at: Callable[[float], AbstractContextManager[None]],
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    seed: int,
    multipliers: Sequence[float] = (-2, -1, 0, 1, 2),
) -> None:
    """A PNG with one row per prompt and one column per multiplier of the network, from the same noise.

    `at(multiplier)` is a context in which the network has that strength.
    """
    columns: list[list[Image]] = []
    for multiplier in multipliers:
        with at(multiplier):
            columns.append(draw(family, encode, prompts, size=size, steps=steps, seed=seed))
    rows = [(prompt, [column[i] for column in columns]) for i, prompt in enumerate(prompts)]
    _save_grid(path, [f"{multiplier:+g}" if multiplier else "0, the base" for multiplier in multipliers], rows)


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
                axes.set_title(textwrap.fill(columns[c], 22), fontsize=7, parse_math=False)
            if c == 0:
                axes.set_ylabel(textwrap.fill(label, 24), fontsize=8, parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
