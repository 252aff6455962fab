"""A job for torchrun in which ranks die: what a rank on Neuron does, with barriers in place of steps, and
without a device.

    torchrun --nproc_per_node=2 --max_restarts=2 -m tests.support.dying DIRECTORY

Rank 1 is killed in the third step of the first attempt, and fails in that of the second.
"""

import os
import signal
import sys
from pathlib import Path

from parallel.runtime import ProcessRuntime, devices, meet, run_process


class Simulated(ProcessRuntime):
    """`store` is the one that torchrun gives to its processes."""

    store = None


def steps(runtime):
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for step in range(4):
        if runtime.rank == 1 and step == 2:
            if attempt == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            if attempt == "1":
                raise RuntimeError("rank one has had enough")
        runtime.barrier()
        (Path(sys.argv[1]) / f"{attempt}-{runtime.rank}-{step}").touch()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # as trainer/main.py, which would finish its step
    devices.on_neuron = lambda: True
    Simulated.store = meet().store
    simulated = Simulated(meet().rank, meet().world_size, None)
    simulated.barrier()  # an initialised process group: all are there
    run_process(steps, simulated)
