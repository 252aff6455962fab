"""The rows of a step do not depend on how ranks divide them, and an epoch has each row once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loader import BEGINNING, Loader, Position, Prefetcher
from tests.support.examples import rows_of

COUNT, GLOBAL_BATCH, STEPS = 27, 8, 4  # the last global batch of an epoch has 3 rows and 5 empty ones
DIVISIONS = [
    (1, 8, 1),
    (2, 2, 2),
    (1, 1, 8),
    (8, 1, 1),
    (4, 1, 2),
    (1, 2, 4),
]  # batch_size, accumulation, dp_size
FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


@pytest.fixture(scope="module")
def rows():
    """Row i has the ids 100 + i, and is padded with 0."""
    return rows_of(
        [(np.full(5, 100 + i), [True] * 5) for i in range(COUNT)], [[index] for index in range(COUNT)], 6
    )


def loaders(rows, batch_size, accumulation, dp_size, seed=9, start=BEGINNING):
    return [
        Loader(
            rows,
            batch_size=batch_size,
            accumulation=accumulation,
            dp_rank=rank,
            dp_size=dp_size,
            seed=seed,
            start=start,
        )
        for rank in range(dp_size)
    ]


def global_batch(rows, division, step, seed=9):
    """[(row seed, row index or None where empty)] of a step, in the order of j."""
    batch_size, accumulation, dp_size = division
    found = [None] * GLOBAL_BATCH
    for rank, loader in enumerate(loaders(rows, *division, seed)):
        micro_batches = loader.step(step)
        assert len(micro_batches) == accumulation
        for micro, batch in enumerate(micro_batches):
            for place in range(batch_size):
                first = int(batch["input_ids"][place, 0])
                j = (micro * dp_size + rank) * batch_size + place
                found[j] = (int(batch["row_seeds"][place]), first - 100 if first else None)
    return found


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_step_is_the_same_in_every_division(rows, division):
    for step in range(2 * STEPS):
        order = np.random.default_rng([9, step // STEPS]).permutation(COUNT).tolist()
        start = step % STEPS * GLOBAL_BATCH
        expected = order[start : start + GLOBAL_BATCH]
        found = global_batch(rows, division, step)
        assert [row for _, row in found] == expected + [None] * (GLOBAL_BATCH - len(expected))
        assert found == global_batch(rows, DIVISIONS[0], step)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(rows):
    epochs = [
        [row for step in range(STEPS) for _, row in global_batch(rows, (2, 2, 2), epoch * STEPS + step)]
        for epoch in range(3)
    ]
    for order in epochs:
        assert len(order) == STEPS * GLOBAL_BATCH
        assert sorted(row for row in order if row is not None) == list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [row for _, row in global_batch(rows, (2, 2, 2), 0, seed=10)] != epochs[0][:GLOBAL_BATCH]


def test_batches_are_whole_rows_and_empty_ones_train_nothing(rows):
    (loader,) = loaders(rows, 8, 1, 1)
    assert loader.global_batch == GLOBAL_BATCH
    assert [loader.epochs(step) for step in (0, 1, STEPS, 2 * STEPS + 1)] == [0, 8 / 27, 1, 2 + 8 / 27]
    assert [loader.steps_until(epochs) for epochs in (0.1, 8 / 27, 0.3, 1, 1.01, 3)] == [
        1,
        1,
        2,
        STEPS,
        STEPS + 1,
        3 * STEPS,
    ]
    (batch,) = loader.step(STEPS - 1)
    assert set(batch) == {*FIELDS, "row_seeds"} and batch["row_seeds"].shape == (8,)
    for name in FIELDS:
        assert batch[name].shape == (8, 6)
    assert all(tensor.dtype == torch.int64 and tensor.device.type == "cpu" for tensor in batch.values())
    for place in range(3):
        index = int(batch["input_ids"][place, 0]) - 100
        for name in FIELDS:
            assert batch[name][place].tolist() == rows.row(index)[name].tolist()
    for name, value in zip(FIELDS, (0, -100, 0, 0), strict=True):
        assert (batch[name][3:] == value).all()


def test_a_step_is_a_function_of_its_number(rows):
    (walked,) = loaders(rows, 4, 2, 1)
    for step in range(STEPS + 1):
        last = walked.step(step)
    (jumped,) = loaders(rows, 4, 2, 1)
    for a, b in zip(last, jumped.step(STEPS), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_row_seeds_are_31_bits_and_differ(rows):
    seeds = [seed for step in range(2 * STEPS) for seed, _ in global_batch(rows, (2, 2, 2), step)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert set(seeds).isdisjoint(seed for seed, _ in global_batch(rows, (2, 2, 2), 0, seed=10))


@pytest.mark.parametrize("batch_size, dp_size", [(1, 1), (2, 2), (4, 2), (8, 4), (2, 8)])
def test_evaluation_has_every_row_once_in_order(rows, batch_size, dp_size):
    ranks = [list(loader.evaluation_batches()) for loader in loaders(rows, batch_size, 3, dp_size)]
    assert {len(batches) for batches in ranks} == {-(-COUNT // (batch_size * dp_size))}
    batches = [batch for together in zip(*ranks, strict=True) for batch in together]
    firsts = [int(first) for batch in batches for first in batch["input_ids"][:, 0]]
    assert firsts == [100 + i for i in range(COUNT)] + [0] * (len(firsts) - COUNT)
    assert all(batch["input_ids"].shape == (batch_size, 6) for batch in batches)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"accumulation": 0}, {"dp_size": 0}, {"dp_rank": 2}, {"dp_rank": -1}, {"seed": -1}],
)
def test_a_layout_that_is_none(rows, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Loader(rows, **{"batch_size": 1, "accumulation": 1, "dp_rank": 0, "dp_size": 2, "seed": 0} | change)


def test_no_rows_and_no_such_step(rows):
    with pytest.raises(ValueError, match="there are no rows"):
        loaders(rows_of([], [], 6), 1, 1, 1)
    with pytest.raises(ValueError, match="step is -1"):
        loaders(rows, 1, 1, 1)[0].step(-1)
    with pytest.raises(ValueError, match="step is 4: 5 or more was expected"):
        loaders(rows, 1, 1, 1, start=Position(5, 0, 5))[0].step(4)


DIVISION = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


def rows_seen(ranks, step):
    """The rows of a step over all ranks, without the empty ones, sorted."""
    firsts = [
        int(first) for loader in ranks for batch in loader.step(step) for first in batch["input_ids"][:, 0]
    ]
    return sorted(first - 100 for first in firsts if first)


@given(
    divisions=st.lists(DIVISION, min_size=1, max_size=5),
    steps=st.lists(st.integers(1, 6), min_size=5, max_size=5),
)
def test_no_row_twice_and_none_lost_however_often_the_division_changes(divisions, steps):
    """A run that resumes in another division has the rows in an epoch that it has without a stop."""
    rows = rows_of(
        [(np.full(5, 100 + i), [True] * 5) for i in range(COUNT)], [[index] for index in range(COUNT)], 6
    )
    start, seen = BEGINNING, []
    for division, count in zip(divisions, steps, strict=False):
        ranks = loaders(rows, *division, start=start)
        for step in range(start.step, start.step + count):
            position = ranks[0].position(step)
            order = np.random.default_rng([9, position.epoch]).permutation(COUNT)
            expected = order[position.row : position.row + ranks[0].global_batch].tolist()
            assert rows_seen(ranks, step) == sorted(expected)
            seen += [(position.epoch, row) for row in expected]
        start = ranks[0].position(start.step + count)
        assert start.epoch * COUNT + start.row == len(seen)
    assert len(set(seen)) == len(seen)
    assert {epoch for epoch, _ in seen} == set(range(start.epoch + (start.row > 0)))


def test_the_prefetcher_gives_the_batches_of_the_loader(rows):
    moved = []

    def move(tensor):
        moved.append(tensor)
        return tensor + 1

    (loader,) = loaders(rows, 2, 2, 1)
    prefetcher = Prefetcher(loader, move)
    for step in (3, 4, 5, 9):  # 9: not the one that was begun
        found = prefetcher.step(step, last=step == 9)
        assert 0 <= prefetcher.waited < 60
        for batch, expected in zip(found, loader.step(step), strict=True):
            assert all(torch.equal(batch[name], expected[name] + 1) for name in expected)
    assert len(moved) in (40, 50)  # after the last step none is begun
