"""The tables behind `--recommend`. Where this project measured something, its result decides and the reason says so.

What is not measured are rules of thumb, in the range of what users of kohya's scripts write. docs/choosing.md has all
of it in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.config.presets import presets

# images below → rank, images a step
BY_SIZE = ((50, 16, 2), (1_000, 32, 4), (5_000, 64, 8), (float("inf"), 128, 8))
RANKS = (4, 128)  # the least and the most that is advised

# difficulty → factor on the rank
BY_DIFFICULTY = {"easy": 0.5, "normal": 1.0, "hard": 2.0}

RATE, SMALL_RATE = 1e-4, 1e-3  # of a base of full size, and of one made for less than SMALL pixels
SMALL = 256
LION = 0.3  # of the rate, since its steps are larger
TEXT = 0.5  # the text encoder's rate over the denoiser's


@dataclass(frozen=True)
class Method:
    """A --network_module, and why it is advised."""

    module: str
    why: str


METHODS: Mapping[str, Method | None] = {
    "easy": None,
    "normal": None,
    "hard": Method(
        "networks.dora",
        "hard: DoRA's held-out loss is 0.3 % below LoRA's, measured on the quickstart's style, for 11 to 18 % more "
        "time a step, and --preset muon on top makes it 1.0 %; diffusers and kohya's scripts load its files as plain "
        "LoRA",
    ),
}
"""difficulty → another method than LoRA, which stays where there is none."""

NOT_ADVISED = {
    "loraplus_lr_ratio=16": "often advised; measured here (one seed), it gained nothing at its best rate",
    "rs_lora=True": "another rate fits then; the same result, measured at rank 16",
    "networks.pissa, networks.loha": "0.6 and 0.8 % behind LoRA of the same size at their best rates, measured",
}
"""What others advise and these measurements do not: docs/rates.md and docs/adapters.md have them."""


def preset_of(family: str, subject: str) -> str:
    """The preset for a subject with a model of this family; "" where there is none."""
    name = f"{'sd15' if family == 'sd' else family}_{subject}"
    return name if name in presets() else ""


def by_size(images: int) -> tuple[int, int]:
    """Rank and images a step for so many images."""
    return next((rank, batch) for most, rank, batch in BY_SIZE if images < most)


def rank_for(usual: int, difficulty: str) -> int:
    """The rank for a difficulty, where `usual` is that for a normal one."""
    least, most = RANKS
    return min(max(round(usual * BY_DIFFICULTY[difficulty]), least), most)


def views(images: int) -> int:
    """How often images are shown in a whole run, together: 400 images ** 0.6.

    The more images there are, the less often each is shown: 20 images 120 times, 100 63, 1,000 25, 10,000 10 times.
    """
    return round(400 * images**0.6)
