"""Checkpoints in host memory, on a lane of the tests: the same bits, what leaves the device, and when it comes back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.guidance import verdict
from library.guidance.estimate import peak_of
from library.guidance.levers import with_changes
from library.guidance.moments import TRAINING
from library.offload.checkpoints import OffloadedCheckpoints
from library.offload.lane import Done
from library.units import human_bytes
from tests.offload.conftest import Made, Planned, same, started, trained
from tests.offload.held_back import HeldBackLane

OFFLOADED = ("--gradient_checkpointing", "--cpu_offload_checkpointing")


SWAPPED = pytest.param(("--mixed_precision", "bf16", "--blocks_to_swap", "100%"), marks=pytest.mark.slow)


@pytest.mark.parametrize("words", [(), SWAPPED])
def test_a_run_has_the_same_bits(made: Made, words: tuple[str, ...]) -> None:
    lane = HeldBackLane()
    run = made(*OFFLOADED, *words, lane=lane)
    checkpointed = trained(made("--gradient_checkpointing", *(words[:2] if words else ())))
    assert same(checkpointed, trained(run))
    assert any(to_host for _, to_host in lane.copies)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)) * shared)


def passed(by: Callable[..., Any], blocks: list[Block], x: Tensor, shared: Tensor) -> Tensor:
    for block in blocks:
        x = by(block, x, shared)
    return x.square().sum()


def stack(count: int = 5, width: int = 16) -> tuple[list[Block], Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(count)]
    return blocks, torch.randn(64, width, requires_grad=True), torch.randn(64, 1)


def test_each_input_leaves_once_and_comes_back_ahead_of_its_turn() -> None:
    blocks, x, shared = stack()
    lane = HeldBackLane()
    by = OffloadedCheckpoints(lane)
    loss = passed(by, blocks, x, shared)
    assert lane.copies == [(x.nbytes, x.nbytes)] * 5  # the shared input stays
    assert lane.waits == [1, 2, 3]  # two are under way at one time; the memory of the others is free again
    came: list[int] = []
    for place, block in enumerate(blocks):  # a block is recomputed at its turn
        block.register_forward_pre_hook(lambda block, args, place=place: came.append((place, len(lane.copies))))
    loss.backward()
    # at a block's turn its own copy and that of the next one have been started
    assert came == [(4, 7), (3, 8), (2, 9), (1, 10), (0, 10)]
    assert [to_host for _, to_host in lane.copies[5:]] == [0] * 5


def test_gradients_are_those_of_no_checkpoint() -> None:
    found = []
    for by in (lambda block, *args: block(*args), OffloadedCheckpoints(HeldBackLane())):
        blocks, x, shared = stack()
        for _ in range(2):  # a second pass as well
            passed(by, blocks, x, shared).backward()
        gradients = [p.grad for block in blocks for p in block.parameters()]
        found.append([x.grad, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_graph_that_is_kept_can_be_passed_twice() -> None:
    blocks, x, shared = stack()
    loss = passed(OffloadedCheckpoints(HeldBackLane()), blocks, x, shared)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_no_gradients_no_copies() -> None:
    blocks, x, shared = stack()
    lane = HeldBackLane()
    with torch.no_grad():
        passed(OffloadedCheckpoints(lane), blocks, x, shared)
    assert lane.copies == []


def test_an_estimate_counts_what_stays_on_the_device() -> None:
    """With inputs of 64 KiB for each of 20 blocks: at the peak, in the backward pass of one of them, its own input is
    back, and that of the block before it. On the host are all of them, once."""
    blocks, x, shared = stack(count=20, width=256)
    peaks, offloaded = [], OffloadedCheckpoints(HeldBackLane())
    plain = torch.utils.checkpoint.checkpoint
    for by in (lambda b, *args: plain(b, *args, use_reentrant=False), offloaded):
        for block in blocks:
            block.requires_grad_(False)
        peaks.append(peak_of(lambda fake, by=by: passed(by, blocks, fake(x).requires_grad_(), fake(shared)).backward()))
    assert 17 * x.nbytes <= peaks[0] - peaks[1] <= 18 * x.nbytes
    assert offloaded.outlines.host == 20 * x.nbytes


class CountingLane:
    """Copies at once, and counts the host memory that is in use."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.now = self.most = self.largest = self.swapped = 0

    def registered(self, count: int) -> Tensor:
        self.swapped += count
        return torch.empty(count, dtype=torch.uint8)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor)
        self._add(host.nbytes)
        self.largest = max(self.largest, host.nbytes)
        weakref.finalize(host, self._add, -host.nbytes)
        return host

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, done: Done) -> None:
        """The copy is done."""


@pytest.mark.slow
def test_the_needs_of_a_run_have_what_its_steps_keep_on_the_host(planned: Planned) -> None:
    """On the device at most three of the inputs are left: the one in use, and two on their way."""
    plan = planned(*OFFLOADED, "--blocks_to_swap", "50%")
    estimates = verdict.estimator(plan)
    needs = estimates.needs(plan.options)
    lane = CountingLane()
    trained(started(plan, lane))
    assert needs.host == {"swapped blocks": pytest.approx(lane.swapped, rel=0.01), "checkpoints": lane.most}
    here = estimates.needs(with_changes(plan.options, {"cpu_offload_checkpointing": False}))
    saved = here.moment(TRAINING).parts["activations"] - needs.moment(TRAINING).parts["activations"]
    assert lane.most - 3 * lane.largest <= saved < lane.most
    said = dict(verdict.rows(plan, None))
    assert said["host memory"].endswith(
        f"while it trains, pinned: swapped blocks {human_bytes(needs.host['swapped blocks'])}, checkpoints "
        f"{human_bytes(needs.host['checkpoints'])}"
    )
