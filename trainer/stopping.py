"""When a run ends early: on SIGTERM, or before --max_minutes are over. All ranks end after the same step."""

import time
from collections import deque

import torch

from parallel.runtime import Runtime
from trainer.job import Job


class Stopping:
    """Collects the stop requests of all ranks, so that all stop after the same step.

    A rank's request is data of the step's graph. The sum over the ranks is read one step late, as the metrics
    are: so all ranks read the same value, although a signal reaches their processes at different times.
    """

    def __init__(self, runtime: Runtime, job: Job):
        """`job.stop_request` is this process's; only rank 0 watches the time."""
        self._runtime, self._asked = runtime, job.stop_request
        self._deadline = job.deadline if runtime.rank == 0 else None
        self._steps, self._last, self._held = deque(maxlen=10), time.monotonic(), None

    def request(self, save_seconds: float) -> torch.Tensor:
        """[1] on the CPU: 1.0 where this rank has to stop, else 0.0.

        The time left has to be enough for three steps, the longest of the last ten, and for two saves of
        `save_seconds`.
        """
        needed = 3 * max(self._steps, default=0.0) + 2 * save_seconds
        late = self._deadline is not None and time.monotonic() + needed > self._deadline
        return torch.tensor([float(late or self._asked.was_made)])

    def should_stop(self, stop_requests: torch.Tensor) -> bool:
        """Whether a rank requested to stop one step ago or earlier.

        `stop_requests` [1] on the device is the sum of this step's. The host waits here until the device has
        finished the step before.
        """
        held, self._held = self._held, stop_requests
        stop = held is not None and self._runtime.read(held)[0] > 0
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now
        return stop
