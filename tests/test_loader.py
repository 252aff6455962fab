"""Which rows a step has does not depend on who takes them, and an epoch has each once."""
import numpy as np
import pytest
import torch

from data.loader import Loader
from data.packing import build_rows
from data.records import Example

COUNT, GLOBAL_BATCH, STEPS = 27, 8, 4       # the last global batch of an epoch has 3 rows and 5 empty ones
DIVISIONS = [(1, 8, 1), (2, 2, 2), (1, 1, 8), (8, 1, 1), (4, 1, 2), (1, 2, 4)]      # batch_size, accumulation, dp_size
FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


@pytest.fixture(scope="module")
def rows():
    """Row i has the ids 100 + i, and is padded with 0."""
    examples = [Example(np.full(5, 100 + i, np.int32), np.full(5, 100 + i, np.int32)) for i in range(COUNT)]
    return build_rows(examples, [[index] for index in range(COUNT)], 6, 0)


def loaders(rows, batch_size, accumulation, dp_size, seed=9):
    return [Loader(rows, batch_size=batch_size, accumulation=accumulation, dp_rank=rank, dp_size=dp_size, seed=seed)
            for rank in range(dp_size)]


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
        expected = order[start:start + GLOBAL_BATCH]
        found = global_batch(rows, division, step)
        assert [row for _, row in found] == expected + [None] * (GLOBAL_BATCH - len(expected))
        assert found == global_batch(rows, DIVISIONS[0], step)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(rows):
    epochs = [[row for step in range(STEPS) for _, row in global_batch(rows, (2, 2, 2), epoch * STEPS + step)]
              for epoch in range(3)]
    for order in epochs:
        assert len(order) == STEPS * GLOBAL_BATCH
        assert sorted(row for row in order if row is not None) == list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [row for _, row in global_batch(rows, (2, 2, 2), 0, seed=10)] != epochs[0][:GLOBAL_BATCH]


def test_batches_are_whole_rows_and_empty_ones_train_nothing(rows):
    loader, = loaders(rows, 8, 1, 1)
    assert (loader.global_batch, loader.steps_per_epoch) == (GLOBAL_BATCH, STEPS)
    batch, = loader.step(STEPS - 1)
    assert set(batch) == {*FIELDS, "row_seeds"} and batch["row_seeds"].shape == (8,)
    for name in FIELDS:
        assert batch[name].shape == (8, 6)
    assert all(tensor.dtype == torch.int64 and tensor.device.type == "cpu" for tensor in batch.values())
    for place in range(3):
        index = int(batch["input_ids"][place, 0]) - 100
        for name in FIELDS:
            assert batch[name][place].tolist() == getattr(rows, name)[index].tolist()
    for name, value in zip(FIELDS, (0, -100, 0, 0), strict=True):
        assert (batch[name][3:] == value).all()


def test_a_step_is_a_function_of_its_number(rows):
    walked, = loaders(rows, 4, 2, 1)
    for step in range(STEPS + 1):
        last = walked.step(step)
    jumped, = loaders(rows, 4, 2, 1)
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


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"accumulation": 0}, {"dp_size": 0}, {"dp_rank": 2},
                                    {"dp_rank": -1}, {"seed": -1}])
def test_a_layout_that_is_none(rows, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Loader(rows, **{"batch_size": 1, "accumulation": 1, "dp_rank": 0, "dp_size": 2, "seed": 0} | change)


def test_no_rows_and_no_such_step(rows):
    with pytest.raises(ValueError, match="there are no rows"):
        loaders(build_rows([], [], 6, 0), 1, 1, 1)
    with pytest.raises(ValueError, match="step is -1"):
        loaders(rows, 1, 1, 1)[0].step(-1)
