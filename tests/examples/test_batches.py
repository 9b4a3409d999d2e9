"""Batches of about equal length, and earlier samples among them."""

from __future__ import annotations

import random

import pytest
import torch

from fine_tuning.batches import NO_LOSS, Sample, batches, mixed, tensors


def samples(*lengths: int, prompt: int = 1) -> list[Sample]:
    return [Sample(tuple(range(number, number + length)), prompt) for number, length in enumerate(lengths)]


def test_every_sample_once_an_epoch_in_another_order() -> None:
    some = samples(*(random.Random(0).choices(range(2, 100), k=1001)))
    first, again, second = (batches(some, 8, seed=3, epoch=epoch) for epoch in (0, 0, 1))
    assert first == again != second
    for epoch in (first, second):
        assert sorted(sample.tokens for batch in epoch for sample in batch) == sorted(sample.tokens for sample in some)
        assert len(epoch) == 126
    assert batches(some, 8, seed=4, epoch=0) != first


def test_batches_have_little_padding() -> None:
    some = samples(*(random.Random(0).choices(range(2, 100), k=1000)))

    def padding(epoch: list[list[Sample]]) -> float:
        width = sum(max(len(sample.tokens) for sample in batch) * len(batch) for batch in epoch)
        return 1 - sum(len(sample.tokens) for sample in some) / width

    at_random = [some[at : at + 8] for at in range(0, 1000, 8)]
    assert padding(at_random) > 0.4
    assert padding(batches(some, 8, seed=0, epoch=0)) < 0.03  # lengths of 2 to 99 in 50 batches: steps of 2


def test_tensors() -> None:
    batch = tensors([Sample((5, 6, 7), 1), Sample((8, 9), 1)], fill=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[NO_LOSS, 6, 7], [NO_LOSS, 9, NO_LOSS]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("new", "earlier", "share", "drawn"), [(70, 100, 0.3, 30), (90, 500, 0.1, 10), (10, 5, 0.5, 10)]
)
def test_the_share_of_earlier_samples(new: int, earlier: int, share: float, drawn: int) -> None:
    """n_earlier = n_new · m / (1 - m)."""
    some, old = samples(*[3] * new), [Sample((1000 + number,), 0) for number in range(earlier)]
    found = mixed(some, old, share, seed=0, epoch=0)
    replayed = [sample for sample in found if sample in old]
    assert found[:new] == some
    assert len(replayed) == drawn
    assert len(set(replayed)) == min(drawn, earlier)
    assert mixed(some, old, share, seed=0, epoch=0) == found
    assert mixed(some, old, 0.0, seed=0, epoch=0) == some


def test_each_epoch_replays_others() -> None:
    old = [Sample((number,), 0) for number in range(100)]
    first, second = (set(mixed(samples(*[3] * 20), old, 0.5, seed=0, epoch=epoch)[20:]) for epoch in (0, 1))
    assert first != second
