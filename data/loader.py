"""Batches of one data parallel rank, as a pure function of the step: resuming needs nothing but the step number."""
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from data.packing import Rows
from data.records import IGNORED

EMPTY = -1      # fills the last, ragged global batch of an epoch: a row of padding, in which nothing is trained


class Loader:
    """Deals rows out to data parallel ranks and micro-batches.

    An optimizer step takes `global_batch` = batch_size x dp_size x accumulation rows of an order that depends on seed
    and epoch; which rows these are does not depend on how the three divide it. Raises ValueError for no rows, sizes
    below 1, a rank outside 0 to dp_size - 1 and a negative seed.
    """

    def __init__(self, rows: Rows, *, batch_size: int, accumulation: int, dp_rank: int, dp_size: int, seed: int):
        for name, size in (("batch_size", batch_size), ("accumulation", accumulation), ("dp_size", dp_size)):
            if size < 1:
                raise ValueError(f"{name} is {size}: at least 1 was expected")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}: 0 to {dp_size - 1} was expected")
        if seed < 0:
            raise ValueError(f"seed is {seed}: 0 or more was expected")
        if not len(rows):
            raise ValueError("there are no rows: at least one was expected")
        self._rows, self._batch_size, self._accumulation = rows, batch_size, accumulation
        self._dp_rank, self._dp_size, self._seed = dp_rank, dp_size, seed
        self.global_batch = batch_size * dp_size * accumulation
        self.steps_per_epoch = -(-len(rows) // self.global_batch)
        self._order = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)))

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of the 0-based optimizer step, counted over the whole run; `_batch` says what is in each.

        Row j of the global batch is in micro-batch m of rank d at place b: j = (m * dp_size + d) * batch_size + b.
        """
        if step < 0:
            raise ValueError(f"step is {step}: 0 or more was expected")
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[in_epoch * self.global_batch:(in_epoch + 1) * self.global_batch]
        chosen = np.concatenate([chosen, np.full(self.global_batch - len(chosen), EMPTY)])
        return [self._batch(chosen, micro * self._dp_size + self._dp_rank, step) for micro in range(self._accumulation)]

    def evaluation_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """All rows once, in order; every rank gets the same number of batches."""
        chosen = np.arange(len(self._rows))
        together = self._batch_size * self._dp_size
        chosen = np.concatenate([chosen, np.full(-len(chosen) % together, EMPTY)])
        for number in range(len(chosen) // together):
            yield self._batch(chosen, number * self._dp_size + self._dp_rank, 0)

    def _batch(self, chosen: np.ndarray, number: int, step: int) -> dict[str, torch.Tensor]:
        """input_ids, labels, position_ids, segment_ids: int64 [batch_size, row_length], CPU; row_seeds: [batch_size].

        A row seed is 31 bits that depend on seed, step and the row's place in the global batch, whichever rank has it.
        """
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        indices = chosen[places.start:places.stop]
        filler = (indices == EMPTY)[:, None]
        batch = {name: np.where(filler, 0, getattr(self._rows, name)[indices])
                 for name in ("input_ids", "position_ids", "segment_ids")}
        batch["labels"] = np.where(filler, IGNORED, self._rows.labels[indices])
        hashes = [zlib.crc32(f"{self._seed}/{step}/{place}".encode()) & 0x7FFFFFFF for place in places]
        batch["row_seeds"] = np.array(hashes)
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
