"""What the tests of the families that are trained by flow matching share: opening them, and fixed inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from library.models.family import ModelFamily
from library.models.opening import open_family

F = TypeVar("F", bound=ModelFamily)
ROUNDED = 2e-5
"""Two orders of sums, in fp32, of answers of about 1."""


def opened(kind: type[F], path: Path, **options: Any) -> F:
    """The family of the model at `path`, which is of this kind. options: of the family, and "vae"."""
    family = open_family(str(path), vae=options.pop("vae", None), options=options)
    assert isinstance(family, kind)
    return family


def loaded(kind: type[F], path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> F:
    """The same with all of its parts."""
    family = opened(kind, path, **options)
    family.components.load_all(family.components.names, dtype, "cpu")
    return family


def beside(files: Mapping[str, Path], **more: Any) -> dict[str, Any]:
    """The options that name these files, but for the base model itself."""
    return {name: str(path) for name, path in files.items() if name != "pretrained_model_name_or_path"} | more


def texts(family: ModelFamily, captions: Sequence[str]) -> dict[str, Tensor]:
    """The encoded captions, without gradients."""
    with torch.no_grad():
        return dict(family.encode_prompts(captions))


def condition(family: ModelFamily, captions: Sequence[str], size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    """What `predict` is given of these captions with images of this size."""
    count = len(captions)
    sizes: Any = {"original_sizes": [size] * count, "crops": [(0, 0)] * count, "target_size": size}
    return dict(family.condition(texts(family, captions), **sizes))


def noisy(count: int, channels: int = 16, height: int = 8, width: int = 12) -> Tensor:
    """[count, channels, height, width] of noise: as it is, of images of 96 × 64 pixels."""
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def assert_same_weights(found: ModelFamily, expected: ModelFamily) -> None:
    """Both families have the same parts, with the same tensors under the same names."""
    assert found.PARTS.keys() == expected.PARTS.keys()
    for part in expected.PARTS:
        theirs = dict(expected.components[part].named_parameters())
        ours = dict(found.components[part].named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
