"""No held-out prompt is trained on, weights are respected, and cut tokens are counted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.selection import cut, split, weigh
from tests.support.examples import tokens_of

EXAMPLES = st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=20)


def numbered(masks):
    """Examples of unique token ids with these masks."""
    first, examples = 0, []
    for mask in masks:
        examples.append((np.arange(first, first + len(mask)), np.array(mask)))
        first += len(mask)
    return examples


def everything(tokens):
    return [np.arange(len(source)) for source in tokens]


@given(masks=EXAMPLES, row_length=st.integers(2, 12), how=st.sampled_from(["truncate", "split"]))
def test_every_token_is_in_one_piece_or_counted_as_cut(masks, row_length, how):
    tokens = [tokens_of(numbered(masks)), tokens_of(numbered(masks[:3]))]
    total = sum(len(source.input_ids) for source in tokens)
    pieces, lost = cut(tokens, everything(tokens), row_length, how)
    assert all(0 < length <= row_length for length in pieces.lengths)
    kept = [
        (number, token)
        for number, start, stop in zip(pieces.source, pieces.start, pieces.stop, strict=True)
        for token in range(start, stop)
    ]
    assert len(set(kept)) == len(kept) == total - lost.tokens
    for number, start, stop in zip(pieces.source, pieces.start, pieces.stop, strict=True):
        source = tokens[number]
        owner = np.searchsorted(source.offsets, start, "right") - 1
        assert stop <= source.offsets[owner + 1] and source.trained[start + 1 : stop].any()
        assert (start - source.offsets[owner]) % row_length == 0 and (
            how == "split" or start == source.offsets[owner]
        )
    # A token that is not kept has no target, or lies beyond the row.
    missing = {
        (number, token) for number, source in enumerate(tokens) for token in range(len(source.input_ids))
    } - set(kept)
    for number, token in missing:
        source = tokens[number]
        owner = np.searchsorted(source.offsets, token, "right") - 1
        place = token - source.offsets[owner]
        begin = source.offsets[owner] + place // row_length * row_length
        end = min(begin + row_length, source.offsets[owner + 1])
        assert how == "truncate" and place >= row_length or not source.trained[begin + 1 : end].any()
    lengths = [len(mask) for mask in [*masks, *masks[:3]]]
    assert lost.examples == sum(length > row_length for length in lengths)


def named(tokens, tmp_path):
    (tmp_path / "where.txt").write_text("".join(f"file:{number}\n" for number in range(len(tokens))))
    return replace(tokens, directory=tmp_path)


def test_what_is_left_without_a_target_is_named(tmp_path):
    tokens = named(tokens_of(numbered([[0, 1], [0] * 8 + [1], [0] * 9 + [1]])), tmp_path)
    pieces, lost = cut([tokens], everything([tokens]), 8, None)
    assert (
        len(pieces.lengths) == 1
        and lost.without_target == [(0, 1), (0, 2)]
        and lost.never_trained == []
        and (lost.examples, lost.tokens) == (2, 19)
    )
    with pytest.raises(
        ValueError,
        match="file:1: 9 tokens are more than --max_seq_length 8: raise it, or pass --long_examples",
    ):
        cut([tokens], everything([tokens]), 8, "refuse")
    text = replace(tokens, meta={"plain_text": True})
    pieces, lost = cut([text], everything([text]), 8, None)  # plain text is split by default
    assert pieces.lengths.tolist() == [2, 2] and lost.without_target == [(0, 1)]


def test_what_no_row_length_would_train_is_told_apart():
    """The first token of an example is predicted by nothing."""
    tokens = tokens_of(numbered([[0, 1], [0] * 9, [1], [0] * 8 + [1], [1, 0, 0]]))
    for how in ("truncate", "split"):
        _, lost = cut([tokens], everything([tokens]), 8, how)
        assert lost.without_target == [(0, 1), (0, 2), (0, 3), (0, 4)]
        assert lost.never_trained == [(0, 1), (0, 2), (0, 4)]


def test_a_split_is_deterministic_and_shares_no_prompt(tmp_path):
    sources = [
        replace(tokens_of(numbered([[0, 1]] * count)), groups=np.arange(count, dtype=np.uint64) % 13)
        for count in (40, 20)
    ]
    train, held_out = split(sources, 20, 3)
    again = split(sources, 20, 3)
    assert all(np.array_equal(a, b) for a, b in zip([*train, *held_out], [*again[0], *again[1]], strict=True))
    groups = [
        set(
            np.concatenate([source.groups[part] for source, part in zip(sources, side, strict=True)]).tolist()
        )
        for side in (train, held_out)
    ]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == set(range(13))
    assert 8 <= sum(map(len, held_out)) <= 12
    skewed = [
        replace(
            tokens_of(numbered([[0, 1]] * 40)),
            groups=np.repeat(np.arange(5, dtype=np.uint64), [36, 1, 1, 1, 1]),
        )
    ]
    assert [sum(map(len, split(skewed, 5, seed)[1])) for seed in range(5)] == [
        2
    ] * 5  # never the prompt that most have
    assert not np.array_equal(held_out[0], split(sources, 20, 4)[1][0])
    two = [tokens_of(numbered([[0, 1]] * 2))]
    for percentage in (1, 99):
        assert [sum(map(len, side)) for side in split(two, percentage, 0)] == [1, 1]
    one = [tokens_of(numbered([[0, 1]]))]
    for tokens, percentage, problem in [(two, 0, "1 to 99"), (two, 100, "1 to 99"), (one, 10, "there is 1")]:
        with pytest.raises(ValueError, match=problem):
            split(tokens, percentage, 3)


@given(count=st.integers(1, 50), weight=st.floats(0.01, 5))
def test_weights_repeat_and_choose(count, weight):
    if not round(weight * count):
        with pytest.raises(ValueError, match="of data set 1 is none"):
            weigh([np.arange(count)], [weight], 1)
        return
    (chosen,) = weigh([np.arange(count)], [weight], 1)
    assert len(chosen) == round(weight * count)
    often = np.bincount(chosen, minlength=count)
    assert often.max(initial=0) - often.min() <= 1
    assert np.array_equal(chosen, weigh([np.arange(count)], [weight], 1)[0])
