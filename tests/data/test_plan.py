"""The order of an epoch and its split: nothing twice, nothing left out, whatever the processes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan import Group, PlannedBatch, epoch_batches, of_rank, split_into_steps

SEEDS = st.integers(0, 2**32)
EPOCHS = st.integers(0, 1000)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    result, first = [], 0
    for number in range(draw(st.integers(1, 4))):
        repeats = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
        members = tuple(enumerate(repeats, start=first))
        result.append(Group(number // 2, (64, 64 + 8 * number), draw(st.integers(1, 5)), members))
        first += len(repeats)
    return result


@settings(max_examples=100)
@given(groups(), SEEDS, EPOCHS)
def test_each_sample_and_repeat_once(groups: list[Group], seed: int, epoch: int) -> None:
    batches = epoch_batches(groups, seed=seed, epoch=epoch)
    wanted = [(index, r) for group in groups for index, repeats in group.members for r in range(repeats)]
    assert Counter(chain.from_iterable(batches)) == Counter(wanted)
    assert batches == epoch_batches(groups, seed=seed, epoch=epoch)
    group_of = {index: group for group in groups for index, _ in group.members}
    short: Counter[int] = Counter()
    for batch in batches:
        (group,) = {id(group_of[index]): group_of[index] for index, _ in batch}.values()  # one bucket, one data set
        assert 0 < len(batch) <= group.batch_size
        short[id(group)] += len(batch) < group.batch_size
    assert all(count <= 1 for count in short.values())
    assert len(batches) == sum(-(-group.draws // group.batch_size) for group in groups)


@settings(max_examples=200)
@given(st.integers(0, 60), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_a_step_is_the_same_for_every_split(count: int, one: tuple[int, int], other: tuple[int, int]) -> None:
    batches = list(range(count))

    def step_contents(split: tuple[int, int]) -> list[list[int | None]]:
        steps = split_into_steps(batches, world_size=split[0], accumulation=split[1])
        return [list(chain.from_iterable(step)) for step in steps]

    assert step_contents(one) == step_contents(other)


@settings(max_examples=200)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 5))
def test_the_split_is_even_and_complete(count: int, world_size: int, accumulation: int) -> None:
    steps = split_into_steps(list(range(count)), world_size=world_size, accumulation=accumulation)
    assert len(steps) == -(-count // (world_size * accumulation))
    assert all(len(step) == accumulation and all(len(micro) == world_size for micro in step) for step in steps)
    shares = [of_rank(steps, rank) for rank in range(world_size)]
    assert sorted(chain.from_iterable(shares)) == list(range(count))
    for s, step in enumerate(steps):
        for k, micro in enumerate(step):
            for rank, batch in enumerate(micro):
                number = (s * accumulation + k) * world_size + rank
                assert batch == (number if number < count else None)
    assert None not in chain.from_iterable(chain.from_iterable(steps[:-1]))  # only the last step is short


def one_group(count: int) -> list[Group]:
    return [Group(0, (64, 64), 4, tuple((index, 2) for index in range(count)))]


def plan(seed: int, epoch: int) -> list[PlannedBatch]:
    return epoch_batches(one_group(30), seed=seed, epoch=epoch)


def test_epochs_and_seeds_differ() -> None:
    plans = {str(plan(seed, epoch)) for seed in range(5) for epoch in range(10)}
    assert len(plans) == 50


def test_members_of_batches_change_too() -> None:
    """Not only the order of the same batches."""
    partners = [{frozenset(batch) for batch in plan(1, epoch)} for epoch in range(2)]
    assert not partners[0] & partners[1]


def test_the_order_of_the_buckets_changes_too() -> None:
    buckets = [Group(0, (64, 64 + 8 * i), 1, ((i, 1),)) for i in range(12)]
    orders = {str(epoch_batches(buckets, seed=1, epoch=epoch)) for epoch in range(5)}
    assert len(orders) == 5


def test_buckets_and_data_sets_are_shuffled_each_in_its_own_way() -> None:
    parts = [(0, (64, 64)), (0, (64, 128)), (1, (64, 64))]
    groups = [Group(*part, 20, tuple((20 * i + k, 1) for k in range(20))) for i, part in enumerate(parts)]
    orders = {tuple(index % 20 for index, _ in batch) for batch in epoch_batches(groups, seed=1, epoch=1)}
    assert len(orders) == 3


def test_the_same_in_another_process() -> None:
    code = (
        "from library.data.plan import Group, epoch_batches\n"
        "group = Group(0, (64, 64), 4, tuple((index, 2) for index in range(30)))\n"
        "print(epoch_batches([group], seed=7, epoch=3))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(plan(7, 3))


def test_the_order_of_other_buckets_does_not_depend_on_a_new_one() -> None:
    first = one_group(10)[0]
    second = Group(0, (64, 128), 4, ((10, 1), (11, 1)))
    alone = set(epoch_batches([first], seed=1, epoch=2))
    assert alone <= set(epoch_batches([first, second], seed=1, epoch=2))
