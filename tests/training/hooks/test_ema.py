"""The average of the weights: against its definition, and what becomes of it in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.training import loop
from library.training.hooks.ema import Ema
from library.training.run import Run
from tests.training.written import assert_refused, weights

Train = Callable[..., int]
EVERY = frozenset(("validate", "sample", "save"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_closed_form(dtype: torch.dtype) -> None:
    """average_n = Π d · w_0 + Σ_k (1 - d_k) Π_{j>k} d_j · w_k, d_k = min(D, (1 + k) / (10 + k)), in fp64."""
    generator = torch.Generator().manual_seed(0)
    series = [torch.randn(3, 5, generator=generator).to(dtype) for _ in range(31)]
    parameter = nn.Parameter(series[0].clone())
    ema = Ema([parameter], decay=0.6, purposes=EVERY)
    for values in series[1:]:
        parameter.data.copy_(values)
        ema.update()
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(30)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.6
    factors = [1.0, *(1 - decay for decay in decays)]
    for n, decay in enumerate(decays):
        factors[: n + 1] = [factor * decay for factor in factors[: n + 1]]
    assert sum(factors) == pytest.approx(1)
    expected = sum(factor * weights.double() for factor, weights in zip(factors, series, strict=True))
    torch.testing.assert_close(ema.average[0].double(), expected, rtol=0, atol=1e-6)


def test_a_constant_stays_the_same() -> None:
    parameter = nn.Parameter(torch.randn(4))
    ema = Ema([parameter], decay=0.999, purposes=EVERY)
    for _ in range(20):
        ema.update()
    torch.testing.assert_close(ema.average[0], parameter.detach(), rtol=0, atol=1e-6)


def test_the_weights_come_back_bit_by_bit() -> None:
    parameter = nn.Parameter(torch.randn(64).to(torch.bfloat16))
    ema = Ema([parameter], decay=0.5, purposes=("save",))
    before = parameter.detach().clone()
    ema.average[0].add_(1)
    run = cast(Run, None)  # which it does not look at
    with ema.weights_for(run, "validate"):
        assert torch.equal(parameter, before)
    with contextlib.suppress(KeyError), ema.weights_for(run, "save"):
        assert torch.equal(parameter, ema.average[0].to(torch.bfloat16))
        raise KeyError
    assert torch.equal(parameter, before)
    assert parameter.requires_grad


@pytest.mark.slow
def test_a_file_holds_the_average_of_the_weights_of_each_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training, saved as it is after each step: the average of these files is the file."""
    words = ("--max_train_steps", "3", "--save_every_n_steps", "1")
    assert train(*words, "--output_name", "plain") == 0
    steps = [weights(tmp_path, f"plain-step0000000{step}") for step in (1, 2, 3)]
    start: list[dict[str, torch.Tensor]] = []

    def remember(run: loop.Run) -> object:
        start.append({key: tensor.clone() for key, tensor in run.network.state_dict().items()})
        return real(run)

    real = loop.train
    monkeypatch.setattr(loop, "train", remember)
    ema = ("--max_train_steps", "3", "--ema_decay", "0.15")
    assert train(*ema, "--ema_for", "sample", "--output_name", "not_for_files") == 0
    assert all(torch.equal(weights(tmp_path, "not_for_files")[key], tensor) for key, tensor in steps[-1].items())
    assert train(*ema, "--output_name", "average") == 0
    found = weights(tmp_path, "average")
    for key in found:
        expected = start[0][key]
        for decay, now in zip((0.1, 0.15, 0.15), steps, strict=True):
            expected = decay * expected + (1 - decay) * now[key]
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-7)
    with safe_open(tmp_path / "out" / "average.safetensors", framework="pt") as file:
        assert file.metadata()["ss_ema_decay"] == "0.15"
        assert file.metadata()["ss_ema_for"] == "validate sample save"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ema_decay", "1"), "--ema_decay 1: nothing would ever enter the average"),
        (("--ema_decay", "1.2"), "must be at most 1"),
        (("--ema_for", "save"), "--ema_for needs --ema_decay"),
        (("--ema_decay", "0.9", "--ema_for", "sav"), "did you mean 'save'"),
        (
            ("--ema_decay", "0.9", "--optimizer_type", "AdamWScheduleFree"),
            "--ema_decay: AdamWScheduleFree averages the weights by itself",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(
    words: tuple[str, ...], message: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(train, words, message, tmp_path, capsys)
