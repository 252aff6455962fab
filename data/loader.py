"""The batches of a data parallel rank: a function of the step, computed by a thread ahead of time."""

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

EMPTY = -1  # instead of a row's number: a row of padding, which fills the last global batch of an epoch
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """How far a run is in the data: after `step` steps, `row` rows of the 0-based `epoch` are trained on."""

    step: int = 0
    epoch: int = 0
    row: int = 0


BEGINNING = Position()


class Loader:
    """Assigns rows to steps, data parallel ranks and accumulation steps.

    An optimizer step takes the next `global_batch` = batch_size x dp_size x accumulation rows, in an order
    that depends on seed and epoch. Which rows these are does not depend on the three factors. A run that
    resumes from `start` takes the rows that follow, whatever its global batch. Raises ValueError for no rows,
    sizes below 1, a rank outside 0 to dp_size - 1, and a negative seed.
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
        self.rows, self._batch_size, self._accumulation = rows, batch_size, accumulation
        self._dp_rank, self._dp_size, self._seed, self._start = dp_rank, dp_size, seed, start
        self.global_batch = batch_size * dp_size * accumulation
        self._order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows))
        )

    def position(self, step: int) -> Position:
        """The position in the data before the 0-based `step`; raises ValueError for one before the start."""
        done = step - self._start.step
        if done < 0:
            raise ValueError(f"step is {step}: {self._start.step} or more was expected")
        epoch, row = self._start.epoch, self._start.row
        in_first = -(-(len(self.rows) - row) // self.global_batch)  # steps left in the epoch of the start
        if done >= in_first:
            epochs, done = divmod(done - in_first, -(-len(self.rows) // self.global_batch))
            epoch, row = epoch + 1 + epochs, 0
        return Position(step, epoch, row + done * self.global_batch)

    def epochs(self, step: int) -> float:
        """The number of epochs, with a fraction, that are done before the 0-based `step`."""
        position = self.position(step)
        return position.epoch + position.row / len(self.rows)

    def steps_until(self, epochs: float) -> int:
        """The number of the first step before which `epochs` epochs are done."""
        most = self._start.step + (math.ceil(epochs) + 1) * -(-len(self.rows) // self.global_batch)
        return bisect_left(range(most), epochs - 1e-9, lo=self._start.step, key=self.epochs)

    def step(self, step: int) -> list[Batch]:
        """The batch of each accumulation step of the 0-based optimizer `step`, counted over the whole run.

        `_batch` describes a batch. Row j of the global batch is row b of rank d in accumulation step m, where
        j = (m * dp_size + d) * batch_size + b.
        """
        position = self.position(step)
        chosen = self._order(position.epoch)[position.row : position.row + self.global_batch]
        chosen = np.concatenate([chosen, np.full(self.global_batch - len(chosen), EMPTY)])
        return [
            self._batch(chosen, accumulation_step * self._dp_size + self._dp_rank, step)
            for accumulation_step in range(self._accumulation)
        ]

    def evaluation_batches(self) -> Iterator[Batch]:
        """Batches with each row once, in order; every rank gets the same number of batches."""
        chosen = np.arange(len(self.rows))
        global_batch = self._batch_size * self._dp_size
        chosen = np.concatenate([chosen, np.full(-len(chosen) % global_batch, EMPTY)])
        for number in range(len(chosen) // global_batch):
            yield self._batch(chosen, number * self._dp_size + self._dp_rank, 0)

    def _batch(self, chosen: np.ndarray, number: int, step: int) -> Batch:
        """Batch `number` of the rows `chosen`, on the CPU.

        input_ids, labels, position_ids, segment_ids: int64 [batch_size, row_length]; row_seeds: int64
        [batch_size]; where the rows have values, segment_values: fp32 [batch_size, segments]. A row's seed
        has 31 bits and depends on seed, step and the row's number in the global batch, but not on the rank.
        """
        numbers = range(number * self._batch_size, (number + 1) * self._batch_size)
        rows = [
            self.rows.empty() if index == EMPTY else self.rows.row(index)
            for index in chosen[numbers.start : numbers.stop]
        ]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["row_seeds"] = np.array(
            [zlib.crc32(f"{self._seed}/{step}/{row}".encode()) & 0x7FFFFFFF for row in numbers]
        )
        return {name: torch.from_numpy(values) for name, values in batch.items()}


class Prefetcher:
    """Batches of consecutive steps, which a thread makes and moves to the device one step ahead.

    `waited` is the number of seconds that the last call of `step` waited for the thread. Python runs it while
    the caller waits for the device or for another rank.
    """

    def __init__(self, loader: Loader, move: Callable[[torch.Tensor], torch.Tensor]):
        self.waited = 0.0
        self._loader, self._move = loader, move
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: tuple[int, Future] | None = None

    def step(self, step: int, last: bool) -> list[Batch]:
        """The batch of each accumulation step, on the device; starts to prepare the next step, if any."""
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
        """Wait for the thread and end it."""
        self._thread.shutdown()

    def _make(self, step):
        return [
            {name: self._move(tensor) for name, tensor in batch.items()} for batch in self._loader.step(step)
        ]
