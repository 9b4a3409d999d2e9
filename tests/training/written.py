"""What a run of the fixture `train` wrote, read back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def weights(folder: Path, name: str = "test") -> dict[str, torch.Tensor]:
    """The tensors of the file of that --output_name."""
    return load_file(folder / "out" / f"{name}.safetensors")


def metadata(folder: Path, name: str = "test") -> dict[str, str]:
    """What its header says."""
    with safe_open(folder / "out" / f"{name}.safetensors", framework="pt") as file:
        return dict(file.metadata())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
