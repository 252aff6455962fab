"""A job for torchrun in which ranks hang in their third step: what a rank on Neuron does, with barriers in
place of steps, and without a device.

    torchrun --nproc_per_node=4 -m tests.support.hanging DIRECTORY SECONDS

Rank 1 sleeps in Python, the process of rank 2 is stopped, and rank 3 sleeps in C without giving Python's lock
away. The job ends where nothing has moved for SECONDS.
"""

import ctypes
import os
import signal
import sys
import time

from parallel.runtime import ProcessRuntime, devices, meet, run_process, watch_stalls


class Simulated(ProcessRuntime):
    """`store` is the one that torchrun gives to its processes."""

    store = None


def hang(rank):
    if rank == 1:
        time.sleep(600)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 3:
        ctypes.PyDLL(None).sleep(600)


def steps(runtime):
    for step in range(1, 5):
        runtime.begin_step(step)
        runtime.progress.tracing("step")
        time.sleep(0.7)
        if step == 3:
            hang(runtime.rank)
        runtime.progress.started("step")
        runtime.barrier()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # as trainer/main.py, which would finish its step
    devices.on_neuron = lambda: True
    peers = meet()
    watch_stalls(peers, sys.argv[1], float(sys.argv[2]) / 60, True)
    Simulated.store = peers.store
    run_process(steps, Simulated(peers.rank, peers.world_size, None))
