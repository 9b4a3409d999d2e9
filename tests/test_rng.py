"""Keyed draws: the same key gives the same numbers everywhere."""

from __future__ import annotations

import subprocess
import sys

import torch

from library import rng


def test_keys_are_fixed_numbers():
    """Written down, because files that users keep (and resumed runs) depend on them."""
    assert rng.key_of(42, 0, 0, "0/cat.png", "noise") == 103542916496696256
    assert rng.key_of("1", 1) != rng.key_of(1, "1")


def test_the_same_in_another_process():
    code = "from library import rng; print(rng.key_of(1, 'ä', None, True), rng.python_random(1, 'x').random())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(rng.key_of(1, "ä", None, True)), str(rng.python_random(1, "x").random())]


def test_one_part_changes_everything():
    base = (7, 0, 0, "0/a.png", "noise")
    others = [
        (8, *base[1:]),
        (7, 1, *base[2:]),
        (7, 0, 1, *base[3:]),
        (*base[:3], "0/b.png", "noise"),
        (*base[:4], "vae"),
    ]
    first = torch.randn(64, generator=rng.torch_generator(*base))
    assert torch.equal(first, torch.randn(64, generator=rng.torch_generator(*base)))
    for other in others:
        correlation = torch.corrcoef(torch.stack([first, torch.randn(64, generator=rng.torch_generator(*other))]))[0, 1]
        assert abs(correlation) < 0.5


def test_the_running_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    torch.randn(5, generator=rng.torch_generator(1, "x"))
    assert torch.equal(torch.randn(3), expected)
