"""The numbers of docs/flux2.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

import math

from library.config.options.flow import FlowOptions
from library.diffusion.flow import ResolutionShift, StepsShift
from tests.docs.tables import page

PAGE = page("flux2")
WIDTHS = {"4B": (5, 20, 3072, 2560), "9B": (8, 24, 4096, 4096)}  # double and single blocks, width, Qwen3's width


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, in both namings, and of a cached caption."""
    kohyas, diffusers, captions = {}, {}, {}
    for name, (doubles, singles, width, states) in WIDTHS.items():
        apart = 2 * (4 * 2 + 7 + 4) * doubles + (10 + 5) * singles  # sums of a layer's sides, in widths
        together = apart + 2 * (3 * (1 + 3) - 3 * 2) * doubles
        kohyas[name], diffusers[name] = (round(count * width * 16 * 2 / 1e6) for count in (together, apart))
        captions[name] = f"{512 * 3 * states * 2 / 1e6:.1f} MB"
    assert f"rank 16 has {kohyas['4B']} MB in bf16 (9B: {kohyas['9B']} MB)" in PAGE
    assert f"of ComfyUI: {diffusers['4B']} MB (9B: {diffusers['9B']} MB)" in PAGE
    assert f"takes {captions['4B']} in bf16, of klein 9B {captions['9B']}" in PAGE
    (doubles, singles, *_), (more_doubles, more_singles, *_) = WIDTHS.values()
    assert f"counts {3 * doubles + singles} (9B: {3 * more_doubles + more_singles})" in PAGE
    assert f"have {doubles + singles} ({more_doubles + more_singles}) numbers" in PAGE


def test_the_shifts() -> None:
    drawn = [f"{ResolutionShift(patch=1).of((side, side)):.2f}" for side in (16, 32, 64)]
    assert "{} at 256 px, {} at 512, {} at 1024".format(*drawn) in PAGE
    of_samples = [f"{StepsShift().of((64, 64), steps):.1f}" for steps in (50, 4)]
    assert "by {} at 1024 px and 50 steps, {} at 4 steps".format(*of_samples) in PAGE
    assert math.isclose(StepsShift().of((64, 64)), StepsShift().of((64, 64), 50))


def test_the_defaults() -> None:
    assert FlowOptions().qwen3_max_token_length == 512
    assert "Always 512 tokens" in PAGE
