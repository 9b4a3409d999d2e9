"""The numbers of docs/flux.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

import re

from tests.docs.tables import page

PAGE = page("flux")


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16: the layers one by one, fused with zeros beside the blocks, and as kohya has them."""
    width, mlp, double, single = 3072, 12288, 19, 38
    shared = double * 2 * (7 * width + 4 * width + 2 * width + 2 * (width + mlp))
    shared += single * ((width + 7 * width) + (width + mlp + width) + (width + 3 * width))
    leaves = shared + double * 2 * 2 * width + single * 3 * width
    fused = leaves + double * 2 * (9 - 3) * width + single * (4 * 7 - 7) * width
    assert (shared, leaves) == (4_786_176, 5_369_856)
    for numbers, said in ((shared, "has 153"), (leaves, "172 MB"), (fused, "has 273 MB")):
        assert re.search(rf"\b{round(numbers * 16 * 2 / 1e6)}\b", said), numbers * 32 / 1e6
        assert said in PAGE
    assert f"{round(leaves * 16 / 1e6)} million numbers" in PAGE
