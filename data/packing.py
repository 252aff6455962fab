"""Several examples in a row of fixed length, kept apart by segment ids, positions and labels."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.records import IGNORED, Example


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: rows of indices whose lengths sum to at most `row_length`, deterministic.

    The longest example first, each into the row with the least room that is enough. Rooms are kept in a bit set, so
    that the search is one shift. Raises ValueError for a length that is no row's.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0                                   # bit r: some row has room r
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
class Rows:
    """int32 arrays [rows, row_length].

    Segments count from 1 in each row, 0 is padding; positions restart in each segment. Labels are shifted: labels[t]
    is what position t has to predict, -100 where nothing is trained; nothing is predicted across a boundary.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def efficiency(self) -> float:
        """The share of tokens that are no padding."""
        return float((self.segment_ids > 0).mean()) if self.segment_ids.size else 0.0


def build_rows(examples: list[Example], groups: list[list[int]], row_length: int, pad_token_id: int) -> Rows:
    """One row for each group of example indices; raises ValueError where a group is longer than a row."""
    shape = (len(groups), row_length)
    rows = Rows(np.full(shape, pad_token_id, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32),
                np.zeros(shape, np.int32))
    for row, group in enumerate(groups):
        start, total = 0, sum(len(examples[index].input_ids) for index in group)
        if total > row_length:
            raise ValueError(f"row {row} is given {total} tokens: at most {row_length} were expected")
        for segment, index in enumerate(group, 1):
            ids, labels = examples[index]
            stop = start + len(ids)
            rows.input_ids[row, start:stop] = ids
            rows.labels[row, start:stop - 1] = labels[1:]
            rows.position_ids[row, start:stop] = np.arange(len(ids))
            rows.segment_ids[row, start:stop] = segment
            start = stop
    return rows
