"""Reads and checks the output of a run of the fixture `train`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROUNDED = 1e-3  # of `distance`: two sizes of a batch, or orders of a sum, in a few steps of fp32 (1.3e-4 seen)


def weights(folder: Path, name: str = "test") -> dict[str, torch.Tensor]:
    """The tensors of the file of that --output_name."""
    return load_file(folder / "out" / f"{name}.safetensors")


def check_files(folder: Path) -> None:
    """Every file of weights holds tensors, and finite ones alone."""
    for path in (folder / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def metadata(folder: Path, name: str = "test") -> dict[str, str]:
    """The metadata of the same file."""
    with safe_open(folder / "out" / f"{name}.safetensors", framework="pt") as file:
        return dict(file.metadata())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Between two trained LoRAs, relative to how far lora_up has moved from its zeros.

    Adam divides each gradient by its own size, so that what rounding does to a number that hardly learns may be as
    large as a step: no bound holds for each number by itself."""
    assert a.keys() == b.keys()
    apart = sum(float((a[key] - b[key]).double().square().sum()) for key in b)
    return (apart / sum(float(b[key].double().square().sum()) for key in b if "lora_up" in key)) ** 0.5


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(train: Callable[..., int], words: Sequence[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with exit code 2, and what it says has this pattern."""
    assert train(*words) == 2
    said = capsys.readouterr().err
    assert re.search(pattern, said), said


def assert_refused(
    train: Callable[..., int], words: Sequence[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with exit code 2 and this message, and without a file."""
    assert train(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("out/*.safetensors"))
