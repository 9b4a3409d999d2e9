"""8-bit codes: the maps, the nearest entry, the floor of second moments, and what a round trip loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.optimizers.custom_adamw import codec


@pytest.mark.parametrize("signed", [True, False])
class TestMap:
    def test_is_bitsandbytes_own(self, signed: bool) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        ours, theirs = codec.dynamic_map(signed=signed).values, functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-6, atol=0
        )  # a few roundings of 6e-8; neighbours are 1e-2 apart

    def test_every_entry_finds_itself(self, signed: bool) -> None:
        table = codec.dynamic_map(signed=signed)
        assert torch.equal(codec.nearest(table.values, table), torch.arange(256, dtype=torch.int32))

    def test_the_nearest_entry(self, signed: bool) -> None:
        """Against a search among all entries: the same distance, up to float32 at the midpoints."""
        table = codec.dynamic_map(signed=signed)
        g = torch.Generator().manual_seed(0)
        size = torch.cat([torch.rand(200_000, generator=g), 10 ** (-9 * torch.rand(200_000, generator=g))])
        y = size * torch.randn(400_000, generator=g).sign() if signed else size
        midpoints = (table.values[1:] + table.values[:-1]) / 2
        found, best = codec.nearest(y, table), torch.bucketize(y, midpoints)
        assert (found != best).float().mean() < 1e-4
        distance = (table.values[found].double() - y.double()).abs()
        least = (table.values[best].double() - y.double()).abs()
        assert (distance <= least * (1 + 1e-4)).all()
        at_midpoints = codec.nearest(midpoints, table)
        assert ((at_midpoints - torch.arange(255)) * (at_midpoints - torch.arange(1, 256)) == 0).all()


@given(st.integers(1, 4), st.integers(1, 1000), st.integers(-30, 30), st.integers(0, 99))
def test_round_trip(k: int, n: int, exponent: int, seed: int) -> None:
    x = torch.randn((k, n), generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    for y, signed in ((x, True), (x.square() if abs(exponent) < 15 else x.abs(), False)):
        table = codec.dynamic_map(signed=signed)
        codes, peaks = codec.encode(y, table, floor=not signed)
        assert codes.dtype == torch.uint8
        assert codes.shape == y.shape
        assert peaks.shape == (k, codec.blocks(n))
        back = codec.decode(codes, peaks, table)
        block_peaks = peaks.repeat_interleave(codec.BLOCK, -1)[:, :n]
        assert ((back - y).abs() <= 0.0075 * block_peaks).all()  # half a step of the highest decade
        assert (back[y.abs() == block_peaks] / y[y.abs() == block_peaks] >= 0.99).all()


def test_zeros() -> None:
    table = codec.dynamic_map(signed=False)
    codes, peaks = codec.encode(torch.zeros(1, 300), table, floor=True)
    assert not codec.decode(codes, peaks, table).any()
    assert not peaks.any()


def test_a_zero_among_others_stays_zero() -> None:
    for signed in (True, False):
        table = codec.dynamic_map(signed=signed)
        x = torch.tensor([[0.0, 1.0, 0.5]])
        assert codec.decode(*codec.encode(x, table, floor=not signed), table)[0, 0] == 0


def test_a_small_second_moment_does_not_vanish() -> None:
    """With ADOPT it is the whole denominator: 0 would leave only the eps."""
    table = codec.dynamic_map(signed=False)
    x = torch.tensor([[1.0, 1e-8, 1e-12, 0.0]])
    floored = codec.decode(*codec.encode(x, table, floor=True), table)
    assert (floored[0, :3] > 0).all()
    assert floored[0, 3] == 0
    assert not codec.decode(*codec.encode(x, table), table)[0, 1:].any()


@pytest.mark.parametrize("size", [1e-38, 1e-42])
def test_the_smallest_numbers_are_no_trouble(size: float) -> None:
    table = codec.dynamic_map(signed=True)
    back = codec.decode(*codec.encode(torch.full((1, 5), size), table), table)
    assert back.isfinite().all()
    assert (back - size).abs().max() <= size
