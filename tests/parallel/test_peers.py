"""The processes of a job tell each other what they know, before the process group is there."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from parallel.runtime import Peers, SharedError, meet
from parallel.runtime import peers as peers_module
from parallel.runtime.peers import ranks_in_words
from tests.support.on_ranks import ROOT
from tests.support.processes import in_processes

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
    """Two machines of two processes each."""

    def process(peers):
        found = peers.first_on_node("node", lambda: peers.rank), peers.gather("values", peers.rank * 10)
        assert peers.first("once", lambda: made.append(peers.rank)) is None
        try:
            peers.agree(
                "versions",
                "1.0" if peers.rank < 3 else "1.1",
                lambda name, value, first: f"{name} has {value} and not {first}",
            )
        except SharedError as error:
            return *found, str(error)

    made = []
    values = [0, 10, 20, 30]
    problem = "rank 3 on host-1 has 1.1 and not 1.0"
    assert in_processes(process, 4) == [(first, values, problem) for first in (0, 0, 2, 2)]
    assert made == [0]


def test_who_is_late_is_named(monkeypatch, capfd):
    """Rank 2 works, rank 3 waits for it, and the machine of ranks 4 and 5 comes late."""
    monkeypatch.setattr(peers_module, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(peers_module, "AGAIN_SECONDS", 0.3)
    store = HashStore()

    def process(rank):
        if rank > 3:
            time.sleep(0.35)
        peers = Peers(store, rank, 6, rank % 2, f"host-{rank // 2}", 2)
        if rank == 2:
            with peers.doing("tokenizes a.jsonl"):
                time.sleep(0.8)  # the first process looks after 0.2 and 0.5 s
        peers.first_on_node("tokens", lambda: rank)
        peers.limit_seconds = 0.6  # and as long again after one was seen at work
        return peers.gather("values", rank)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(process, range(6))) == [list(range(6))] * 6
    said = capfd.readouterr().err.splitlines()
    assert [said[0], said[1], said[-1]] == [
        "waiting for rank 2 on host-1, which tokenizes a.jsonl; ranks 4-5 (machine 2): not started yet",
        "waiting for rank 2 on host-1, which tokenizes a.jsonl",
        "all have come (values)",
    ]


def test_after_the_limit_the_first_process_names_who_has_not_come():
    def process(peers):
        peers.limit_seconds = 0.3
        if peers.rank != 2:
            peers.gather("the start", None)

    found = in_processes(process, 4)
    assert "minutes of waiting: rank 2 on host-1: the start" in str(found[0])
    assert ranks_in_words([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
