"""The choice of examples to train on and to hold out, and how long ones are cut to the row length."""

from dataclasses import dataclass

import numpy as np

from data.packing import Pieces
from data.tokens import Tokens

Chosen = list[np.ndarray]  # for each source, int64 numbers of its examples


def split(tokens: list[Tokens], percentage: int, seed: int) -> tuple[Chosen, Chosen]:
    """(training, held-out) examples, in the order of the data: `seed` chooses about `percentage` to hold out.

    Examples of any source that share a prompt (or text) are a group and stay together, so no prompt of the
    evaluation is trained on. At most `percentage` are held out, but at least the smallest group. Raises
    ValueError where there is only one group.
    """
    if not 1 <= percentage <= 99:
        raise ValueError(f"the percentage to hold out is {percentage}: 1 to 99 was expected")
    groups, sizes = np.unique(np.concatenate([source.groups for source in tokens]), return_counts=True)
    if len(groups) < 2:
        raise ValueError(
            "holding out a part for evaluation needs at least two examples with prompts (or texts) of "
            f"their own; there {'is' if len(groups) == 1 else 'are'} {len(groups)}"
        )
    left, held_out = int(sizes.sum()) * percentage // 100, []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if sizes[group] <= left:
            held_out.append(groups[group])
            left -= sizes[group]
    held_out = held_out or [groups[np.argmin(sizes)]]
    sides = [np.isin(source.groups, held_out) for source in tokens]
    return [np.flatnonzero(~side) for side in sides], [np.flatnonzero(side) for side in sides]


def weigh(chosen: Chosen, weights: list[float], seed: int, pairs: bool = False) -> Chosen:
    """The examples of each source, repeated `weights` times, in the order of the data.

    For the fractional part of a weight, `seed` chooses the examples. With `pairs`, both examples of a pair
    are chosen. Raises ValueError where a weight leaves no example of its source.
    """
    if pairs:
        weighed = weigh([examples[::2] for examples in chosen], weights, seed)
        return [np.stack([first, first + 1], 1).reshape(-1) for first in weighed]
    weighed = []
    for number, (examples, weight) in enumerate(zip(chosen, weights, strict=True)):
        if len(examples) and not round(weight * len(examples)):
            raise ValueError(
                f"--dataset_weights {weight} of the {len(examples)} examples of data set {number + 1} is none"
            )
        whole, rest = divmod(round(weight * len(examples)), max(1, len(examples)))
        order = np.random.default_rng([seed, number]).permutation(len(examples))[:rest]
        weighed.append(np.concatenate([*[examples] * whole, examples[np.sort(order)]]))
    return weighed


@dataclass(frozen=True)
class Cut:
    """What `cut` removed: how many examples were longer than a row, and how many tokens were cut off.

    `without_target` has (source, number) of the examples that have no trained token left: their target lies
    wholly beyond the row. `never_trained` has those of them that have no target token at any row length.
    """

    examples: int
    tokens: int
    without_target: list[tuple[int, int]]
    never_trained: list[tuple[int, int]]


def cut(
    tokens: list[Tokens], chosen: Chosen, row_length: int, long_examples: str | None
) -> tuple[Pieces, Cut]:
    """The chosen examples as pieces of at most `row_length` tokens, and what was removed.

    `long_examples` says what happens to a longer example: truncate, split (each piece is an example of its
    own) or refuse (raises ValueError); None splits plain text and truncates other examples. A piece without a
    trained token is left out, and its tokens count as cut off.
    """
    found, longer, cut_tokens, without_target, never_trained = [], 0, 0, [], []
    for number, (source, examples) in enumerate(zip(tokens, chosen, strict=True)):
        method = long_examples or ("split" if source.meta["plain_text"] else "truncate")
        # trained_before[t]: the number of trained tokens among the first t.
        trained_before = np.concatenate([[0], np.cumsum(source.trained)])
        start, end = source.offsets[examples], source.offsets[examples + 1]
        longer += int((end - start > row_length).sum())
        if method == "refuse" and (end - start > row_length).any():
            first = int(np.argmax(end - start > row_length))
            raise ValueError(
                f"{source.where(int(examples[first]))}: {end[first] - start[first]} tokens are more than "
                f"--max_seq_length {row_length}: raise it, or pass --long_examples truncate or split"
            )
        pieces_each = -(-(end - start) // row_length) if method == "split" else np.ones(len(start), np.int64)
        owner = np.repeat(np.arange(len(start)), pieces_each)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces_each) - pieces_each, pieces_each)
        piece_start = start[owner] + nth * row_length
        piece_stop = np.minimum(piece_start + row_length, end[owner])
        # Nothing predicts the first token of a piece.
        useful = trained_before[piece_stop] > trained_before[np.minimum(piece_start + 1, piece_stop)]
        cut_tokens += int((end - start).sum() - (piece_stop - piece_start)[useful].sum())
        lost = np.setdiff1d(np.arange(len(start)), owner[useful])
        without_target += [(number, int(examples[index])) for index in lost]
        never = trained_before[end] == trained_before[np.minimum(start + 1, end)]
        never_trained += [(number, int(examples[index])) for index in lost[never[lost]]]
        found.append((np.full(int(useful.sum()), number), piece_start[useful], piece_stop[useful]))
    pieces = Pieces(*(np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True)))
    return pieces, Cut(longer, cut_tokens, without_target, never_trained)


def fit_pairs(
    tokens: list[Tokens], chosen: Chosen, row_length: int, refuse: bool
) -> tuple[Pieces, list[tuple[int, int]]]:
    """(pieces, left_out): the chosen preference pairs that fit into a row, two pieces each, and the others.

    `left_out` has (source, number of the chosen answer's example). Pairs are never cut: what is cut off one
    answer would count as a preference. Raises ValueError for the first that does not fit, where `refuse`.
    """
    found, left_out = [], []
    for number, (source, examples) in enumerate(zip(tokens, chosen, strict=True)):
        start, stop = source.offsets[examples], source.offsets[examples + 1]
        together = (stop - start).reshape(-1, 2).sum(1)
        fits = np.repeat(together <= row_length, 2)
        left_out += [(number, int(example)) for example in examples[~fits][::2]]
        if refuse and left_out:
            longest = int(together[int(np.argmax(together > row_length))])
            raise ValueError(
                f"{source.where(left_out[0][1])}: the pair's {longest} tokens are more than --max_seq_length "
                f"{row_length}: raise it, or leave such pairs out without --long_examples refuse"
            )
        found.append((np.full(int(fits.sum()), number), start[fits], stop[fits]))
    return Pieces(*(np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True))), left_out
