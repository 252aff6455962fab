"""When a run ends early: on SIGTERM, or before --max_minutes are over. All ranks end after the same step."""

import time
from collections import deque

import torch

from parallel.runtime import Runtime
from trainer.job import Job


class Stopping:
    """Asks each rank whether it has to stop, and remembers what all ranks said.

    A rank's wish is data of the step's graph, and the sum over the ranks is read one step late, as the
    metrics are: so all ranks read the same, and stop after the same step, though a signal reaches their
    processes at different times.
    """

    def __init__(self, runtime: Runtime, job: Job):
        """`job.terminated` is set by SIGTERM; the time is rank 0's to watch."""
        self._runtime, self._terminated = runtime, job.terminated
        self._deadline = job.deadline if runtime.rank == 0 else None
        self._steps, self._last, self._held = deque(maxlen=10), time.monotonic(), None

    def wish(self, save_seconds: float) -> torch.Tensor:
        """[1] on the CPU: 1.0 where this rank has to stop. A save takes `save_seconds`; the time left has to
        do for three steps, the longest of the last ten, and twice that."""
        needed = 3 * max(self._steps, default=0.0) + 2 * save_seconds
        late = self._deadline is not None and time.monotonic() + needed > self._deadline
        return torch.tensor([float(late or self._terminated.is_set())])

    def agreed(self, wishes: torch.Tensor) -> bool:
        """Whether a rank wished to stop before the step before this one. `wishes` [1] on the device: the sum
        of this step's.

        The host waits here until the device has finished the step before.
        """
        held, self._held = self._held, wishes
        stop = held is not None and self._runtime.read(held)[0] > 0
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now
        return stop
