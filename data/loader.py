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

    An optimizer step takes `global_batch` = batch_size x dp_size x accumulation rows of an order that depends on seed and epoch;
    which rows these are does not depend on how the three divide it.
    """

    def __init__(self, rows: Rows, *, batch_size: int, accumulation: int, dp_rank: int, dp_size: int, seed: int):
        self._rows, self._batch_size, self._accumulation = rows, batch_size, accumulation
        self._dp_rank, self._dp_size, self._seed = dp_rank, dp_size, seed
        self.global_batch = batch_size * dp_size * accumulation
        self.steps_per_epoch = -(-len(rows) // self.global_batch)
        self._order = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)))

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of the 0-based optimizer step, counted over the whole run; see `_batch` for what is in each."""
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
        """int64 [batch_size, row_length] on the CPU: input_ids, labels, position_ids, segment_ids; and row_seeds [batch_size].

        A row seed is 31 bits that depend on seed, step and the row's place in the global batch, whichever rank has it.
        """
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        indices = chosen[places.start:places.stop]
        filler = (indices == EMPTY)[:, None]
        batch = {name: np.where(filler, 0, getattr(self._rows, name)[indices])
                 for name in ("input_ids", "position_ids", "segment_ids")}
        batch["labels"] = np.where(filler, IGNORED, self._rows.labels[indices])
        batch["row_seeds"] = np.array([zlib.crc32(f"{self._seed}/{step}/{place}".encode()) & 0x7FFFFFFF for place in places])
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
