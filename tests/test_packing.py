"""Packing loses nothing, is tight, and nothing is predicted across a boundary."""
import numpy as np
import pytest

from data.packing import build_rows, pack
from data.records import Example


@pytest.mark.parametrize("row_length", [512, 2048])
def test_every_example_once_no_row_over_and_tight(row_length):
    lengths = np.clip(np.random.default_rng(1).lognormal(4.5, 1.0, 10000).astype(int), 2, row_length)
    groups = pack(lengths, row_length)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert max(lengths[group].sum() for group in groups) <= row_length
    assert lengths.sum() / (len(groups) * row_length) >= 0.99
    assert groups == pack(lengths.tolist(), row_length)


def test_best_fit_decreasing_by_hand():
    assert pack([3, 7, 5, 5, 3], 10) == [[1, 0], [2, 3], [4]]       # ties by index
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]                     # both rows have room; the first has the least
    assert pack([10, 10], 10) == [[0], [1]] and pack([], 10) == []


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_is_no_rows(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens: 1 to 8 was expected"):
        pack([8, length], 8)


def some_examples(count):
    generator = np.random.default_rng(2)
    ids = [generator.integers(3, 500, length).astype(np.int32) for length in generator.integers(1, 20, count)]
    return [Example(each, np.where(np.arange(len(each)) < len(each) // 2, -100, each).astype(np.int32)) for each in ids]


def test_rows_against_a_token_by_token_recomputation():
    examples, row_length = some_examples(60), 32
    groups = pack([len(example.input_ids) for example in examples], row_length)
    rows = build_rows(examples, groups, row_length, 7)
    for row, group in enumerate(groups):
        expected = []
        for segment, index in enumerate(group, 1):
            ids, labels = examples[index]
            for position in range(len(ids)):
                target = int(labels[position + 1]) if position + 1 < len(ids) else -100
                expected.append((int(ids[position]), target, position, segment))
        expected += [(7, -100, 0, 0)] * (row_length - len(expected))
        arrays = (rows.input_ids, rows.labels, rows.position_ids, rows.segment_ids)
        assert list(zip(*(array[row].tolist() for array in arrays), strict=True)) == expected
    assert all(array.dtype == np.int32 and array.shape == (len(groups), row_length) for array in arrays)
    assert len(rows) == len(groups)
    assert rows.efficiency == pytest.approx(sum(len(example.input_ids) for example in examples) / rows.input_ids.size)


def test_nothing_is_predicted_across_a_boundary():
    examples = some_examples(60)
    rows = build_rows(examples, pack([len(example.input_ids) for example in examples], 32), 32, 7)
    row, place = np.nonzero(rows.labels != -100)
    assert len(row) and place.max() < 31
    assert (rows.segment_ids[row, place] == rows.segment_ids[row, place + 1]).all()
    assert (rows.segment_ids[row, place] > 0).all()
    assert (rows.input_ids[row, place + 1] == rows.labels[row, place]).all()


def test_a_group_that_is_too_long():
    examples = [Example(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32))] * 2
    with pytest.raises(ValueError, match="row 1 is given 10 tokens: at most 8 were expected"):
        build_rows(examples, [[0], [0, 1]], 8, 0)
