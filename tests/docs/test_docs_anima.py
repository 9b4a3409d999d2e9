"""The numbers of docs/anima.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

from tests.docs.tables import page

PAGE = page("anima")


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, and of a caption of 60 tokens."""
    width, mlp, states, blocks = 2048, 8192, 1024, 28
    block = 4 * 2 * width + (2 * 2 * width + 2 * (states + width)) + 2 * (width + mlp)
    assert blocks * block == 1_433_600
    assert f"{round(blocks * block * 16 * 2 / 1e6)} MB for rank 16" in PAGE
    assert f"takes {60 * states * 2 / 1e6:.2f} MB in bf16" in PAGE
