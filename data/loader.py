"""Batches of one data parallel rank: a function of the step, prepared by a thread while the device works."""

import math
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data.packing import Rows
from data.tokens import IGNORED

EMPTY = -1  # fills the last, ragged global batch of an epoch: a row of padding, in which nothing is trained
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: `row` rows of the 0-based `epoch` have been trained on after `step` steps."""

    step: int = 0
    epoch: int = 0
    row: int = 0


BEGINNING = Position()


class Loader:
    """Deals rows out to data parallel ranks and micro-batches.

    An optimizer step takes `global_batch` = batch_size x dp_size x accumulation rows of an order that depends
    on seed and epoch; which rows these are does not depend on how the three divide it. A run that goes on
    from `start` takes the rows that follow, whatever its global batch. Raises ValueError for no rows, sizes
    below 1, a rank outside 0 to dp_size - 1 and a negative seed.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        start: Position = BEGINNING,
    ):
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
        self._dp_rank, self._dp_size, self._seed, self._start = dp_rank, dp_size, seed, start
        self.global_batch = batch_size * dp_size * accumulation
        self._order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows))
        )

    def position(self, step: int) -> Position:
        """Where in the data the run is before the 0-based `step`, which is not below that of the start."""
        done = step - self._start.step
        if done < 0:
            raise ValueError(f"step is {step}: {self._start.step} or more was expected")
        epoch, row = self._start.epoch, self._start.row
        first = -(-(len(self._rows) - row) // self.global_batch)  # steps that are left of the start's epoch
        if done >= first:
            epochs, done = divmod(done - first, -(-len(self._rows) // self.global_batch))
            epoch, row = epoch + 1 + epochs, 0
        return Position(step, epoch, row + done * self.global_batch)

    def epochs(self, step: int) -> float:
        """How often the data has been gone through before the 0-based `step`."""
        position = self.position(step)
        return position.epoch + position.row / len(self._rows)

    def steps_until(self, epochs: float) -> int:
        """The number of the first step before which the data has been gone through so often."""
        most = self._start.step + (math.ceil(epochs) + 1) * -(-len(self._rows) // self.global_batch)
        return bisect_left(range(most), epochs - 1e-9, lo=self._start.step, key=self.epochs)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of the 0-based optimizer step, counted over the whole run; `_batch` says what is
        in each.

        Row j of the global batch is in micro-batch m of rank d at place b: j = (m * dp_size + d) * batch_size
        + b.
        """
        position = self.position(step)
        chosen = self._order(position.epoch)[position.row : position.row + self.global_batch]
        chosen = np.concatenate([chosen, np.full(self.global_batch - len(chosen), EMPTY)])
        return [
            self._batch(chosen, micro * self._dp_size + self._dp_rank, step)
            for micro in range(self._accumulation)
        ]

    def evaluation_batches(self) -> Iterator[Batch]:
        """All rows once, in order; every rank gets the same number of batches."""
        chosen = np.arange(len(self._rows))
        together = self._batch_size * self._dp_size
        chosen = np.concatenate([chosen, np.full(-len(chosen) % together, EMPTY)])
        for number in range(len(chosen) // together):
            yield self._batch(chosen, number * self._dp_size + self._dp_rank, 0)

    def _batch(self, chosen: np.ndarray, number: int, step: int) -> Batch:
        """input_ids, labels, position_ids, segment_ids: int64 [batch_size, row_length], CPU; row_seeds:
        [batch_size].

        A row seed is 31 bits that depend on seed, step and the row's place in the global batch, whichever
        rank has it.
        """
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        rows = [
            self._empty() if index == EMPTY else self._rows.row(index)
            for index in chosen[places.start : places.stop]
        ]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["row_seeds"] = np.array(
            [zlib.crc32(f"{self._seed}/{step}/{place}".encode()) & 0x7FFFFFFF for place in places]
        )
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _empty(self):
        zeros = np.zeros(self._rows.row_length, np.int64)
        return {"input_ids": zeros, "labels": zeros + IGNORED, "position_ids": zeros, "segment_ids": zeros}


class Prefetcher:
    """The batches of step after step, made and moved by a thread while the step before is traced and run.

    `waited` is how many seconds the last call of `step` has waited for it. The thread is Python's: it works
    while the caller waits for the device, or for another rank.
    """

    def __init__(self, loader: Loader, move: Callable[[torch.Tensor], torch.Tensor]):
        self.waited = 0.0
        self._loader, self._move = loader, move
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: tuple[int, Future] | None = None

    def step(self, step: int, last: bool) -> list[Batch]:
        """The micro-batches of the step, on the device; those of the next step are begun, but after the
        `last`."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._make, step))
        begun = time.perf_counter()
        batches = self._next[1].result()
        self.waited = time.perf_counter() - begun
        if last:
            self.close()
        else:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return batches

    def close(self) -> None:
        self._thread.shutdown()

    def _make(self, step):
        return [
            {name: self._move(tensor) for name, tensor in batch.items()} for batch in self._loader.step(step)
        ]
