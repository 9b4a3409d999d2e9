"""The numbers of docs/chroma.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

import re

from tests.docs.tables import page

PAGE = page("chroma")


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16: the layers one by one, fused with zeros beside the blocks, and as kohya has them. And of a
    caption of 60 tokens with the end and one of padding."""
    width, mlp, double, single = 3072, 12288, 19, 38
    shared = double * 2 * (4 * width + 2 * width + 2 * (width + mlp)) + single * (
        (width + 7 * width) + (width + mlp + width)
    )
    leaves = shared + double * 2 * 2 * width + single * 3 * width
    fused = leaves + double * 2 * (9 - 3) * width + single * (4 * 7 - 7) * width
    assert shared == 3_502_080
    for numbers, said in ((shared, "has 112"), (leaves, "131 MB"), (fused, "has 232 MB")):
        assert re.search(rf"\b{round(numbers * 16 * 2 / 1e6)}\b", said), numbers * 32 / 1e6
        assert said in re.sub(r"\s+", " ", PAGE)
    assert f"{round(leaves * 16 / 1e6)} million numbers" in PAGE
    assert f"takes {62 * (4096 * 2 + 8) / 1e6:.2f} MB in bf16" in PAGE
