"""Packing loses no token, leaves little padding, and no token is predicted from another example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import Pieces, Rows, pack
from tests.support.examples import rows_of, tokens_of


@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_every_example_once_and_no_row_over(lengths):
    groups = pack(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in group) <= 20 for group in groups)
    assert groups == pack(np.array(lengths, np.int64), 20)
    # Two rows that are at most half full would have been one.
    assert sum(sum(lengths[index] for index in group) <= 10 for group in groups) <= 1


@pytest.mark.parametrize("row_length, efficiency", [(512, 0.99), (2048, 0.995)])
def test_dollys_lengths_are_packed_tightly(row_length, efficiency):
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(110), 1.1, 15000).astype(int), 2, 5000).clip(
        max=row_length
    )
    assert lengths.sum() / (len(pack(lengths, row_length)) * row_length) >= efficiency


def test_best_fit_decreasing_by_hand():
    assert pack([3, 7, 5, 5, 3], 10) == [[1, 0], [2, 3], [4]]  # ties by index
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]  # both rows have room; the first has the least
    assert pack([10, 10], 10) == [[0], [1]] and pack([], 10) == []


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_is_no_rows(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens: 1 to 8 was expected"):
        pack([8, length], 8)


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=32), min_size=1, max_size=30),
    seed=st.integers(0, 9),
)
def test_rows_against_a_token_by_token_recomputation(masks, seed):
    generator = np.random.default_rng(seed)
    examples = [(generator.integers(3, 500, len(mask)), mask) for mask in masks]
    groups = pack([len(mask) for mask in masks], 32)
    rows = rows_of(examples, groups, 32, pad=7)
    for number, group in enumerate(groups):
        expected = []
        for segment, index in enumerate(group, 1):
            ids, trained = examples[index]
            for position in range(len(ids)):
                target = int(ids[position + 1]) if position + 1 < len(ids) and trained[position + 1] else -100
                expected.append((int(ids[position]), target, position, segment))
        expected += [(7, -100, 0, 0)] * (32 - len(expected))
        row = rows.row(number)
        assert all(array.dtype == np.int64 and array.shape == (32,) for array in row.values())
        assert (
            list(
                zip(
                    *(row[name].tolist() for name in ("input_ids", "labels", "position_ids", "segment_ids")),
                    strict=True,
                )
            )
            == expected
        )
    assert len(rows) == len(groups) and rows.efficiency == pytest.approx(
        sum(map(len, masks)) / (len(groups) * 32)
    )


def test_pieces_of_several_sources():
    sources = [tokens_of([(range(10, 16), [0, 0, 1, 1, 1, 1])]), tokens_of([(range(20, 23), [0, 1, 1])])]
    rows = Rows(
        sources, Pieces(np.array([0, 1, 0]), np.array([0, 0, 3]), np.array([3, 3, 6])), [[2, 1], [0]], 8, 0
    )
    assert rows.row(0)["input_ids"].tolist() == [13, 14, 15, 20, 21, 22, 0, 0]
    assert rows.row(0)["labels"].tolist() == [14, 15, -100, 21, 22, -100, -100, -100]
    assert rows.row(1)["labels"].tolist() == [-100, 12, *[-100] * 6]


def test_a_group_that_is_too_long():
    with pytest.raises(ValueError, match="row 1 is given 10 tokens: at most 8 were expected"):
        rows_of([(np.arange(5), [True] * 5)] * 2, [[0], [0, 1]], 8)
