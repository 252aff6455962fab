"""All processes of a job get what the first one knows, before the process group is there."""

import os
import subprocess
import sys

import pytest

from parallel.runtime.first import from_first_process
from tests.support.on_ranks import ROOT

PROGRAM = """
import os
import torch.distributed as dist
from parallel.runtime import devices, from_first_process
devices.on_neuron = lambda: True
mine = "first" if os.environ["RANK"] == "0" else "other"
found = [from_first_process("date", mine), from_first_process("date", "later"), from_first_process("x", mine)]
dist.init_process_group("gloo")
dist.barrier()
print(found)
"""


def test_one_process_keeps_its_own():
    assert from_first_process("date", "mine") == "mine"


@pytest.mark.process
@pytest.mark.parametrize("agent", [True, False])
def test_processes_agree_and_meet_afterwards(agent):
    """With the store of torchrun's agent, and where the first process is its host."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store  # its port is free again
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | shared | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert found == ["['first', 'first', 'first']"] * 2
