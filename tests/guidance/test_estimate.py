"""Estimates against what really happens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from library.guidance.autocast import gpu_autocast
from library.guidance.estimate import parameter_bytes, peak_of
from library.units import human_bytes, human_time


def test_peak_counts_what_lives_together():
    mb = 1 << 18  # floats

    def work(fake):
        a = fake(torch.empty(mb)) * 2
        b = a + 1
        del a
        return b * 3

    assert peak_of(work) == 2 * 4 * mb


def test_peak_of_a_training_step_is_close_to_what_torch_allocates():
    """Against the profiler's record of the real allocations."""
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(512, 256)
    estimate = peak_of(lambda fake: model(fake(x)).square().mean().backward())
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        model(x).square().mean().backward()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert estimate == pytest.approx(peak, rel=0.15)


def test_a_gpus_autocast_computes_norms_in_fp32():
    """torch's lists: on a CPU norms keep the precision of their input. Twice the bytes, and a copy of the input."""
    bf16, norm = torch.bfloat16, nn.GroupNorm(2, 4, dtype=torch.bfloat16)
    x = torch.zeros(1, 4, 64, 64, dtype=bf16)
    peaks = {}
    for on_gpu in (False, True):

        def work(fake, on_gpu=on_gpu):
            with gpu_autocast() if on_gpu else nullcontext(), torch.autocast("cpu", bf16):
                assert norm(fake(x)).dtype == (torch.float32 if on_gpu else bf16)

        peaks[on_gpu] = peak_of(work, [norm])
    assert peaks[False] == pytest.approx(x.nbytes, abs=100)
    assert peaks[True] == pytest.approx(4 * x.nbytes, abs=100)


def test_views_writes_and_small_tensors():
    """A view needs no memory, nor does writing; small tensors are real, so that they can be read."""
    seen, real = [], torch.empty(1 << 20)

    def work(fake):
        x = fake(real)
        x.view(1024, 1024).t().add_(1)
        seen.append(torch.arange(4).sum().item())
        halves = x.chunk(2)
        x[:10].copy_(torch.ones(10))
        seen.append([half.shape[0] for half in halves])
        with pytest.raises(RuntimeError, match="item"):
            x.sum().item()

    assert peak_of(work) == 4
    assert seen == [6, [1 << 19] * 2]


def test_a_real_buffer_can_be_written_to():
    buffer, real = torch.zeros(1 << 14), torch.arange(1 << 14)
    assert peak_of(lambda fake: buffer.copy_(real)) == 0
    assert torch.equal(buffer, real.float())


def test_parameter_bytes():
    assert parameter_bytes([nn.Linear(10, 10).half(), nn.BatchNorm1d(4)]) == 110 * 2 + 4 * 4 * 4 + 8


def test_words():
    assert [human_bytes(n) for n in (12, 2048, 5.5 * 2**30)] == ["12 B", "2.0 KiB", "5.5 GiB"]
    assert [human_time(s) for s in (3.21, 200, 3720)] == ["3.2 s", "3 min 20 s", "1 h 02 min"]
