"""A job for torchrun in which rank 1 hangs in its third step: what a rank on Neuron does, with barriers in
place of steps, and without a device.

    torchrun --nproc_per_node=2 -m tests.support.hanging sleeps|stops|holds DIRECTORY SECONDS

It sleeps in Python; its process is stopped; or it sleeps in C without giving Python's lock away. The job ends
where nothing has moved for SECONDS.
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


def hang(how):
    if how == "sleeps":
        time.sleep(600)  # the line that is looked for
    elif how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        ctypes.PyDLL(None).sleep(600)


def steps(runtime):
    for step in range(1, 5):
        runtime.begin_step(step)
        runtime.progress.tracing("step")
        if runtime.rank == 1 and step == 3:
            hang(sys.argv[1])
        runtime.progress.started("step")
        runtime.barrier()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # as trainer/main.py, which would finish its step
    devices.on_neuron = lambda: True
    peers = meet()
    watch_stalls(peers, sys.argv[2], float(sys.argv[3]) / 60, True)
    Simulated.store = peers.store
    run_process(steps, Simulated(peers.rank, peers.world_size, None))
