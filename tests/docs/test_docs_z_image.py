"""The numbers of docs/z-image.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

from tests.docs.tables import page

PAGE = page("z-image")


def test_the_sizes_of_the_files() -> None:
    """Of rank 16 in bf16, and of a caption of 60 tokens with the eight of the chat, three of them before it."""
    width, mlp, states, layers = 3840, 10240, 2560, 30
    per_rank = layers * (4 * 2 * width + 3 * (width + mlp))
    assert per_rank == 2_188_800
    assert f"{round(per_rank * 16 * 2 / 1e6)} MB for rank 16" in PAGE
    chat = 3 + 5
    assert f"takes {(60 + chat) * (states * 2 + 8) / 1e6:.2f} MB in bf16" in PAGE
