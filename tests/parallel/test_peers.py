"""The processes of a job tell each other what they know, before the process group is there."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel.runtime import Peers, meet
from tests.support.on_ranks import ROOT

PROGRAM = """
import os
import torch.distributed as dist
from parallel.runtime import devices, meet
devices.on_neuron = lambda: True
mine = "first" if os.environ["RANK"] == "0" else "other"
peers = meet()
found = [peers.share("date", mine), peers.share("date", "later"), *peers.gather("all", mine)]
dist.init_process_group("gloo")
dist.barrier()
print(found)
"""


def test_one_process_keeps_its_own():
    assert meet().share("date", "mine") == "mine"
    assert meet().gather("date", "mine") == ["mine"]


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
    shared |= {"LOCAL_WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert found == ["['first', 'first', 'first', 'other']"] * 2


def test_nodes_and_disagreements():
    """Two machines of two processes each, as threads with a store in memory."""
    from torch.distributed import HashStore

    store = HashStore()

    def process(rank):
        peers = Peers(store, rank, 4, rank % 2, f"host-{rank // 2}")
        found = peers.share_on_node("node", rank), peers.gather("values", rank * 10)
        try:
            peers.agree(
                "versions",
                "1.0" if rank < 3 else "1.1",
                lambda name, value, first: f"{name} has {value} and not {first}",
            )
        except ValueError as error:
            return *found, str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(process, range(4)))
    values = [0, 10, 20, 30]
    problem = "rank 3 on host-1 has 1.1 and not 1.0"
    assert found == [(first, values, problem) for first in (0, 0, 2, 2)]
