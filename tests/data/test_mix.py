"""Draws by shares: every folder its part, every image of a folder as often as the others, whatever was drawn before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.data.dataset import TrainingData
from library.data.mix import Mix, Pool, ratios, turn
from library.data.plan import epoch_batches
from library.data.prepare import prepare
from library.errors import UserError

MakeSubset = Callable[..., SubsetSpec]
MakeDataset = Callable[..., DatasetSpec]
MakeFolder = Callable[..., Path]

PARTS = st.lists(st.floats(0.001, 1), min_size=1, max_size=8).map(tuple)


@settings(max_examples=100)
@given(PARTS, st.integers(1, 300))
def test_turns_are_counted_and_every_part_gets_its_own(parts: tuple[float, ...], places: int) -> None:
    counts: Counter[int] = Counter()
    for place in range(places):
        which, own = turn(place, ratios(parts))
        assert own == counts[which]
        counts[which] += 1
    for index, part in enumerate(parts):
        assert abs(counts[index] - places * part / sum(parts)) < 1 + index  # each before it may be one off


def test_rare_turns_do_not_come_together() -> None:
    """30 buckets of one image each, beside one of 270: in any tenth of 300 places a tenth of the rare ones."""
    shares = ratios((*[1 / 300] * 30, 0.9))
    rare = [turn(place, shares)[0] < 30 for place in range(300)]
    assert sum(rare) in range(29, 32)
    assert all(1 <= sum(rare[start : start + 60]) <= 11 for start in range(0, 300, 60))


def some_mix(batch_size: int = 4) -> Mix:
    """Folder 0 has 70 % of the draws and 10 images, folder 1 the rest and 40; a bucket of one image of folder 1."""
    common = Pool(0, 0.7, tuple(range(10))), Pool(1, 0.3 * 39 / 40, tuple(range(10, 49)))
    return Mix(0, batch_size, 5, (((64, 64), common), ((64, 96), (Pool(1, 0.3 / 40, (49,)),))))


def test_every_image_of_a_folder_as_often_as_the_others() -> None:
    mix = some_mix()
    epochs = [mix.epoch(seed=3, epoch=epoch) for epoch in range(200)]
    assert all(len(batches) == 5 and all(len(batch) == 4 for batch in batches) for batches in epochs)
    draws = Counter(sample for batches in epochs for batch in batches for sample, _ in batch)
    first = [draws[sample] for sample in range(10)]
    second = [draws[sample] for sample in range(10, 49)]
    assert sum(first) == pytest.approx(0.7 * 4000, abs=4)
    assert max(first) - min(first) <= 1
    assert max(second) - min(second) <= 1
    assert draws[49] == pytest.approx(30, abs=4)  # in whole batches, of its own bucket
    for batches in epochs:  # nothing is the same draw twice, and no batch has two sizes
        assert len(set(chain.from_iterable(batches))) == 20
        assert all({sample == 49 for sample, _ in batch} in ({True}, {False}) for batch in batches)


def test_a_small_share_shows_other_images_in_each_epoch() -> None:
    mix = Mix(0, 2, 5, (((64, 64), (Pool(0, 0.5, (0, 1)), Pool(1, 0.5, tuple(range(2, 102))))),))
    seen = [
        {sample for batch in mix.epoch(seed=1, epoch=epoch) for sample, _ in batch if sample > 1} for epoch in range(20)
    ]
    assert [len(one) for one in seen] == [5] * 20
    assert len(set().union(*seen)) == 100


def test_an_epoch_is_the_same_without_those_before_it_and_for_each_seed_another() -> None:
    mix = some_mix()
    assert mix.epoch(seed=3, epoch=7) == mix.epoch(seed=3, epoch=7)
    assert len({str(mix.epoch(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_groups_describe_the_first_epoch() -> None:
    mix = some_mix()
    common, rare = mix.groups()
    first = [len({sample for sample, _ in batch} & {49}) for batch in mix.epoch(seed=3, epoch=0)]
    assert (common.batches, rare.batches) == (first.count(0), first.count(1))
    assert (common.draws, common.largest_batch, rare.largest_batch) == (4 * first.count(0), 4, 4)
    assert dict(common.members)[0] == pytest.approx(1.4)
    assert dict(rare.members) == {49: pytest.approx(0.15)}
    assert sum(draws for group in (common, rare) for _, draws in group.members) == pytest.approx(20)
    assert rare.example() == ((49, 0), (49, 1), (49, 2), (49, 3))
    planned = epoch_batches([common, rare], seed=3, epoch=1, by_shares=mix.epoch(seed=3, epoch=1))
    assert Counter(planned) == Counter(mix.epoch(seed=3, epoch=1))


def test_from_folders_to_batches(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    """Regularisation images by share, in two buckets, beside a data set that has none."""
    cats = folder("cats", a=(64, 64), b=(64, 64))
    reg = folder("reg", **{f"r{i}": (64, 64) if i < 5 else (96, 48) for i in range(7)})
    parts = subset(image_dir=cats, num_repeats=7), subset(image_dir=reg, is_reg=True, share=0.3)
    plain = dataset(subset(image_dir=cats), batch_size=1)
    prepared = prepare([dataset(*parts, enable_bucket=True, batch_size=2), plain], multiple_of=16)
    assert [(one.draws, one.least, one.by_shares) for one in prepared.summaries] == [
        (pytest.approx(14), pytest.approx(7), True),
        (pytest.approx(6), pytest.approx(6 / 7), True),
        (2, 1, False),
    ]
    assert (prepared.batches_per_epoch, prepared.train_images) == (12, 2)
    data = TrainingData(prepared, seed=5)
    draws = Counter(
        prepared.samples[sample].key for epoch in range(70) for batch in data.plan(epoch) for sample, _ in batch
    )
    assert sum(count for key, count in draws.items() if key.startswith("1/")) == pytest.approx(0.3 * 1400, abs=4)
    assert draws["2/a.png"] == draws["2/b.png"] == 70
    assert all(draws[f"1/r{i}.png"] == pytest.approx(60, abs=3) for i in range(7))


def test_an_epoch_is_rounded_up_to_full_batches(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    parts = (
        subset(image_dir=folder("a", a=(64, 64)), num_repeats=6),
        subset(image_dir=folder("b", b=(64, 64)), share=0.4),
    )
    prepared = prepare([dataset(*parts, batch_size=4)], multiple_of=8)  # ten draws are asked for
    assert prepared.batches_per_epoch == 3
    assert [summary.draws for summary in prepared.summaries] == [pytest.approx(7.2), pytest.approx(4.8)]


def test_too_large_a_share(subset: MakeSubset, dataset: MakeDataset, folder: MakeFolder) -> None:
    parts = subset(image_dir=folder("a", a=(64, 64))), subset(image_dir=folder("b", b=(64, 64)), share=0.99999999)
    with pytest.raises(UserError, match=r"an epoch would have \d+ images, and 20000000 are the most: one share leaves"):
        prepare([dataset(*parts)], multiple_of=8)
