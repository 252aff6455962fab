"""Packing: several examples in a row of fixed length, kept apart by segment ids, positions and labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.tokens import IGNORED, Tokens


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `row_length`, by best-fit decreasing; deterministic.

    Examples are taken from the longest to the shortest, and each goes into the fullest row that has room for
    it. The rooms that rows have are bits of one integer, so the search is a shift. Raises ValueError for a
    length that is not from 1 to `row_length`.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where a row has room for r tokens
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        if not 1 <= length <= row_length:
            raise ValueError(f"example {index} has {length} tokens: 1 to {row_length} was expected")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := room - length:
            by_room[left].append(row)
            rooms |= 1 << left
    return rows


@dataclass(frozen=True)
class Pieces:
    """The parts of examples that go into rows: piece i has tokens start[i] to stop[i] of source source[i]."""

    source: np.ndarray  # int64 [pieces]
    start: np.ndarray  # int64 [pieces]
    stop: np.ndarray  # int64 [pieces]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pieces]: tokens per piece."""
        return self.stop - self.start


@dataclass(frozen=True)
class Rows:
    """Rows of `row_length` tokens; `groups[r]` has the numbers of the pieces in row r, in order.

    `values` fp32 [pieces], if any, are known of each piece and handed to the model's objective; a row then
    has room for those of `segments` pieces.
    """

    tokens: list[Tokens]
    pieces: Pieces
    groups: list[list[int]]
    row_length: int
    pad_token_id: int
    segments: int = 0
    values: np.ndarray | None = None

    def __post_init__(self):
        """Raise ValueError where a group is longer than a row."""
        lengths = self.pieces.lengths
        for row, group in enumerate(self.groups):
            if (total := sum(int(lengths[piece]) for piece in group)) > self.row_length:
                raise ValueError(
                    f"row {row} is given {total} tokens: at most {self.row_length} were expected"
                )

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def efficiency(self) -> float:
        """The share of the rows' tokens that are not padding."""
        return int(self.pieces.lengths.sum()) / max(1, len(self) * self.row_length)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """input_ids, labels, position_ids, segment_ids: int64 [row_length].

        Segments are numbered from 1, and 0 is padding. Positions restart in each segment. Labels are shifted:
        labels[t] is the token that position t has to predict, or IGNORED where nothing is trained. The last
        position of a segment predicts nothing. Where there are values, segment_values: fp32 [segments], that
        of segment s at s - 1, 0 where there is no such segment.
        """
        row = {
            "input_ids": np.full(self.row_length, self.pad_token_id),
            "labels": np.full(self.row_length, IGNORED),
            "position_ids": np.zeros(self.row_length, np.int64),
            "segment_ids": np.zeros(self.row_length, np.int64),
        }
        begin = 0
        for segment, piece in enumerate(self.groups[index], 1):
            tokens = self.tokens[self.pieces.source[piece]]
            part = slice(self.pieces.start[piece], self.pieces.stop[piece])
            ids, trained = tokens.input_ids[part], tokens.trained[part]
            end = begin + len(ids)
            row["input_ids"][begin:end] = ids
            row["labels"][begin : end - 1] = np.where(trained, ids, IGNORED)[1:]
            row["position_ids"][begin:end] = np.arange(len(ids))
            row["segment_ids"][begin:end] = segment
            begin = end
        return row | self._values_of(self.groups[index])

    def empty(self) -> dict[str, np.ndarray]:
        """A row of padding alone."""
        zeros = np.zeros(self.row_length, np.int64)
        row = {"input_ids": zeros, "labels": zeros + IGNORED, "position_ids": zeros, "segment_ids": zeros}
        return row | self._values_of([])

    def _values_of(self, group: list[int]) -> dict[str, np.ndarray]:
        if self.values is None:
            return {}
        values = np.zeros(self.segments, np.float32)
        values[: len(group)] = self.values[group]
        return {"segment_values": values}
