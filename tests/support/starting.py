"""Jobs whose start fails, each of three processes on two machines: ranks 0 and 1, and rank 2.

    python -m tests.support.starting DIRECTORY FAULT...

The jobs run side by side. Prints a JSON object: {fault: {"statuses" of the ranks, "lines" of stderr of each,
"seconds" from the fault to the end of all}}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from parallel.runtime import devices, meet, prepare_environment, watch_job


def rank_of_job(fault: str) -> int:
    """What trainer/main.py does, with barriers in place of reading data."""
    peers, watch = meet(), watch_job()
    signal.signal(signal.SIGTERM, watch.terminated)
    try:
        with watch.telling():
            peers.gather("the start", None)
            Path("ready").touch()
            if fault == "fails" and peers.rank == 2:
                raise MemoryError("no room")
            if fault == "differs":
                peers.agree("colour", peers.rank // 2, lambda name, *values: f"{name} has {values}")
            if peers.rank == 1:
                peers.first_on_node("what rank 0 never gives", lambda: None)
            time.sleep(60)
    except (MemoryError, ValueError) as error:
        print("error:", watch.in_words(error), file=sys.stderr)
        return 1
    return 0


def serve() -> int:
    """The store, as torchrun's agent has it."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    Path("port.new").write_text(str(store.port))
    Path("port.new").rename("port")
    time.sleep(120)
    return 0


def forked(directory: Path, name: str, variables: dict, function, *arguments) -> int:
    """The number of a process that runs the function in the directory; its stderr is the file `name`."""
    child = os.fork()
    if not child:
        os.environ |= variables
        os.chdir(directory)
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
        os._exit(function(*arguments))
    return child


def wait_for(path: Path) -> str:
    while not path.exists():
        time.sleep(0.02)
    return path.read_text()


def run(directory: Path, faults: list[str]) -> dict:
    jobs, found = {}, {}
    for fault in faults:
        (directory / fault).mkdir()
        server = forked(directory / fault, "store", {}, serve)
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": wait_for(directory / fault / "port")}
        shared |= {"WORLD_SIZE": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = []
        for rank in range(3):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(2 - rank // 2)}
            ranks.append(forked(directory / fault, str(rank), shared | place, rank_of_job, fault))
        jobs[fault] = server, ranks
    for fault, (server, ranks) in jobs.items():
        wait_for(directory / fault / "ready")
        time.sleep(0.2)
        if fault == "is told to end":
            os.kill(ranks[0], signal.SIGTERM)
        if fault == "loses the store":
            os.kill(server, signal.SIGKILL)
    begun = time.monotonic()
    for fault, (server, ranks) in jobs.items():
        statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        lines = [(directory / fault / str(rank)).read_text().splitlines() for rank in range(3)]
        found[fault] = {"statuses": statuses, "lines": lines, "seconds": time.monotonic() - begun}
        os.kill(server, signal.SIGKILL)
    return found


if __name__ == "__main__":
    devices.on_neuron = lambda: True
    prepare_environment(3)
    import torch.distributed  # noqa: F401  (once, before the forks)

    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
