"""The inputs of FLUX's and Chroma's transformers: images as tokens, their places, masks, and the time with all of its
digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PATCH = 2  # latent cells of a token's side


def packed(latents_BCHW: Tensor) -> Tensor:
    """Patches of 2 × 2 cells as tokens [B, N, 4 C], in the order channel, row, column; N row by row."""
    tokens: Tensor = torch.nn.functional.pixel_unshuffle(latents_BCHW, PATCH).flatten(2).transpose(1, 2)
    return tokens


def unpacked(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """The way back to [B, C, h, w]; height, width: in patches."""
    patches = tokens_BND.transpose(1, 2).unflatten(2, (height, width))
    return torch.nn.functional.pixel_shuffle(patches, PATCH)


def places(height: int, width: int, *, device: torch.device) -> Tensor:
    """(0, row, column) of each patch, [N, 3] in float32: bf16 does not tell whole numbers above 256 apart."""
    rows, columns = (torch.arange(count, device=device, dtype=torch.float32) for count in (height, width))
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1)


def places_of_flux2(height: int, width: int, texts: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """FLUX.2's places, each in float32: (0, row, column, 0) of each patch, [N, 4], and (0, 0, 0, place) of each of so
    many states of a text, [L, 4]."""
    images = torch.nn.functional.pad(places(height, width, device=device), (0, 1))
    order = torch.arange(texts, device=device, dtype=torch.float32)
    return images, torch.nn.functional.pad(order[:, None], (3, 0))


def whole_mask(mask_BL: Tensor, images: int) -> Tensor:
    """For texts of L states and images of N tokens, [B, 1, 1, L + N]: True where there is no padding.

    Attention adds numbers to its scores and hides what is False, so 0 and 1 would hide nothing.
    """
    texts = mask_BL.bool()
    return torch.cat([texts, texts.new_ones(len(texts), images)], dim=1)[:, None, None]


@contextmanager
def exact_time(embedding: nn.Module, level_B: Tensor, *, answer: torch.dtype | None = None) -> Iterator[None]:
    """A context in which the embedding of time gets 1000 σ in float32. The module would round σ to its own dtype
    first: in bf16 0.700 and 0.701 would be the same. answer: the dtype of what it returns, if that is not its own."""
    time_B = level_B.float() * 1000
    handles = [embedding.register_forward_pre_hook(lambda _, arguments: (time_B, *arguments[1:]))]
    if answer is not None:
        handles.append(embedding.register_forward_hook(lambda _, arguments, found: found.to(answer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
