"""Pretended machines: torchrun's store, an agent for each machine, and its ranks, forked from one process.

What torchrun does is done here without its imports, which take a rank five seconds and 400 MB each: this
process has imported everything, and a rank is a fork of it. The process that runs this must have started no
thread that holds a lock, no OpenMP, gloo or XLA. A restart is torchrun's: an agent whose rank has failed ends
the others of its machine (SIGTERM, after 30 s SIGKILL), and all start anew.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tools.bench_ranks import counting, standin

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE_SECONDS = 30.0  # torchrun's, between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
SAMPLE_SECONDS = 2.0  # between two looks at the memory of all processes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Cluster:
    """`machines` pretended machines with `processes` ranks in all, which run trainer/main.py with `flags`.

    directory: has logs and marks, attempt-<n>/rank-<r>.log and .jsonl, and a folder machine-<m> for each
    machine, in which its ranks run: relative paths among the flags are the machine's own. plant(rank,
    machine, attempt) is called in a rank before its program starts.
    """

    processes: int
    machines: int
    flags: list[str]
    directory: Path
    plant: Callable[[int, int, int], None] = lambda rank, machine, attempt: None
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, restarts: int = 0, limit: float = 600.0) -> list["Attempt"]:
        """Start all, and again up to `restarts` times where they fail; each attempt ends after `limit`
        seconds."""
        attempts = []
        while True:
            with hosted_store() as port:  # torchrun has a new one for each attempt, too
                attempts.append(self._attempt(len(attempts), port, limit, len(attempts) < restarts))
            if attempts[-1].succeeded or attempts[-1].hung or len(attempts) > restarts:
                return attempts

    def _attempt(self, number: int, port: int, limit: float, again: bool) -> "Attempt":
        """One start of all. Where they may start `again`, the agents of the other machines learn of a
        failure; else those ranks have to end by themselves."""
        logs = self.directory / f"attempt-{number}"
        logs.mkdir(parents=True)
        attempt = Attempt(logs, self.processes, time.monotonic())
        agents = {fork(self._agent, machine, number, port, logs) for machine in range(self.machines)}
        sampled = 0.0
        while agents:
            ended = {each: status for each in agents for got, status in [os.waitpid(each, os.WNOHANG)] if got}
            agents -= ended.keys()
            now = time.monotonic()
            if again and any(ended.values()):
                _signal(agents, signal.SIGTERM)
            if now - attempt.begun > limit and not attempt.hung:
                attempt.hung = True
                _signal(agents, signal.SIGKILL)  # and their ranks with them
            if now - sampled > SAMPLE_SECONDS:
                attempt.sample()
                sampled = time.monotonic()
            time.sleep(POLL_SECONDS)
        attempt.seconds = time.monotonic() - attempt.begun
        return attempt

    def _agent(self, machine: int, attempt: int, port: int, logs: Path) -> int:
        """Start the ranks of a machine and wait for them; returns 1 where one has failed."""
        told = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: told.set())
        a_machine = self.processes // self.machines
        ranks = {
            fork(self._rank, rank, machine, attempt, port, logs): rank
            for rank in range(machine * a_machine, (machine + 1) * a_machine)
        }
        (logs / f"machine-{machine}.pids").write_text(" ".join(map(str, ranks)))
        ended, asked_at, failed = {}, None, False
        while ranks:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                status = os.waitstatus_to_exitcode(status)
                ended[ranks.pop(process)] = [status, time.monotonic(), asked_at is not None]
                failed |= status != 0
            elif (failed or told.is_set()) and asked_at is None:
                asked_at = _signal(ranks, signal.SIGTERM)
            elif asked_at and time.monotonic() - asked_at > GRACE_SECONDS:
                asked_at = _signal(ranks, signal.SIGKILL)
            else:
                time.sleep(POLL_SECONDS)
        (logs / f"machine-{machine}.json").write_text(json.dumps(ended))
        return int(failed)

    def _rank(self, rank: int, machine: int, attempt: int, port: int, logs: Path) -> int:
        """Be a rank: what torchrun prepares, then trainer/main.py."""
        log = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        (self.directory / f"machine-{machine}").mkdir(exist_ok=True)
        os.chdir(self.directory / f"machine-{machine}")
        a_machine = self.processes // self.machines
        os.environ |= self.environment | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % a_machine),
            "GROUP_RANK": str(machine),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(a_machine),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_RUN_ID": "bench",
        }
        torch.set_num_threads(1)  # a forked process makes a new pool, which threads must not do at once
        standin.install(rank, self.processes, f"machine-{machine}")
        counts = counting.Counts(logs / f"rank-{rank}.jsonl")
        counting.begin(counts)
        counts.mark("started")
        self.plant(rank, machine, attempt)
        program = str(ROOT / "trainer" / "main.py")
        sys.argv[:] = [program, *self.flags]
        runpy.run_path(program, run_name="__main__")
        counts.mark("ended")
        return 0


@dataclass
class Attempt:
    """What one start of all ranks came to. `seconds` until the last process ended; `hung`: it had to be
    ended; `peak`: the most memory of all ranks together, bytes, of samples every SAMPLE_SECONDS."""

    logs: Path
    processes: int
    begun: float
    seconds: float = 0.0
    hung: bool = False
    peak: int = 0

    def sample(self) -> None:
        """Look at the memory of all ranks."""
        total = 0
        for file in self.logs.glob("machine-*.pids"):
            for process in file.read_text().split():
                with suppress(OSError, KeyError, IndexError):  # it has ended
                    total += counting.private_memory(process)["pss"]
        self.peak = max(self.peak, total)

    @property
    def succeeded(self) -> bool:
        """Whether every rank has ended with status 0."""
        ended = self.ended()
        return len(ended) == self.processes and not any(status for status, _, _ in ended.values())

    def ended(self) -> dict[int, tuple[int, float, bool]]:
        """(status, seconds since the start, whether the agent had told it to end) of each rank that has
        ended by itself or by its agent."""
        found = {}
        for file in self.logs.glob("machine-*.json"):
            for rank, (status, at, told) in json.loads(file.read_text()).items():
                found[int(rank)] = status, at - self.begun, told
        return found

    def marks(self) -> dict[int, list[dict]]:
        """The marks of each rank (counting.Counts.mark), with seconds since the start."""
        found = {}
        for rank in range(self.processes):
            lines = (self.logs / f"rank-{rank}.jsonl").read_text().splitlines()
            marks = map(json.loads, lines)
            found[rank] = [mark | {"seconds": mark["seconds"] - self.begun} for mark in marks]
        return found

    def printed(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.logs / f"rank-{rank}.log").read_text(errors="replace")


def prepare() -> None:
    """Import everything that a rank needs, so that its fork shares the memory; to be called once, first."""
    os.environ |= {"PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # torch asks the DNS for the name of the store's machine, for each connection, and waits for an answer.
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    import torch_xla.distributed.xla_backend  # noqa: F401
    import transformers  # noqa: F401

    import trainer.job
    import trainer.loop  # noqa: F401
    from trainer.tokenizer import load_tokenizer

    load_tokenizer(ROOT / "data/sample/tiny")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a rank would write to every object's page


@contextmanager
def hosted_store() -> Iterator[int]:
    """The port of a store that a process of its own hosts, as torchrun's agent does."""
    ready, told = os.pipe()

    def serve():
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(told, str(store.port).encode())
        signal.pause()

    process = fork(serve)
    os.close(told)
    yield int(os.read(ready, 100))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(ready)


def fork(function: Callable, *arguments) -> int:
    """Call the function in a forked process, whose status is its result, and which dies with this one;
    returns its number."""
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            status = function(*arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _signal(processes, number: signal.Signals) -> float:
    """Send a signal to all; returns the time."""
    for process in processes:
        os.kill(process, number)
    return time.monotonic()
