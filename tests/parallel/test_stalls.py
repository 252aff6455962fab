"""When a job does not move, a report says who is late, and its stack says why."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch.distributed import HashStore

from parallel.graph import backend
from parallel.runtime import Peers, Progress, stalls, watch_stalls
from parallel.runtime.late import shortened, who_is_late, whose_stacks
from parallel.runtime.progress import here
from parallel.runtime.stalls import Stalls
from parallel.runtime.watch import KEY, children
from tests.support import hanging
from tests.support.on_ranks import ROOT, run_program
from tests.support.runs import environment

LIMIT = 900.0


class Job:
    """Two machines of two ranks each, with a store in memory and a clock that the test turns."""

    def __init__(self, folder, ends=False):
        self.now, self.store, self.folder, self.stopped = 0.0, HashStore(), folder, set()
        self.waits = ExitStack()
        self.ranks = [Progress(self._clock) for _ in range(4)]
        peers = [Peers(self.store, rank, 4, rank % 2, f"host-{rank // 2}") for rank in range(4)]
        self.stalls = [
            Stalls(each, progress, folder, LIMIT, ends, self._clock)
            for each, progress in zip(peers, self.ranks, strict=True)
        ]

    def _clock(self):
        return self.now

    def pass_time(self, seconds):
        """Every rank that is not stopped looks once a second."""
        for _ in range(seconds):
            self.now += 1
            for rank, each in enumerate(self.stalls):
                if rank not in self.stopped:
                    each.look(self.store)

    def step(self, number, *ranks):
        """The ranks have started the graph of this step."""
        for rank in ranks:
            self.ranks[rank].begin_step(number)
            self.ranks[rank].tracing("step")
            self.ranks[rank].traced("step")
            self.ranks[rank].started("step")

    def wait(self, what, *ranks):
        for rank in ranks:
            self.waits.enter_context(self.ranks[rank].waiting(what))

    @property
    def reports(self):
        return sorted(self.folder.glob("stalls/*/report.txt"))


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """A list: while there is something in it, this process compiles."""
    now = []
    monkeypatch.setattr(backend, "is_compiling", lambda: bool(now))
    return now


def test_the_late_one_is_named_once_and_again_at_twice_the_time(tmp_path, capfd):
    job = Job(tmp_path)
    job.step(11, 0, 1, 2, 3)
    job.pass_time(3)
    job.step(12, 0, 1, 3)
    job.wait("waiting for the device", 0, 1, 3)
    job.ranks[2].begin_step(12)
    job.pass_time(int(LIMIT) - 5)
    assert capfd.readouterr().err == ""
    job.pass_time(10)
    said = capfd.readouterr().err
    late = r"late: rank 2 on host-1: step 12, preparing the step, for 15 min; in .*\.py:\d+, \w+"
    assert said.startswith("stalled: rank 0 on host-0 has not moved for 15 min\n"), said
    assert "\n  ranks 0-1, 3: step 12, graph step, waiting for the device\n" in said
    assert re.search(late, said), said
    [folder] = tmp_path.glob("stalls/*")
    # The first of each machine, and the late one.
    assert {path.name for path in folder.iterdir()} == {"report.txt", "rank-00000.txt", "rank-00002.txt"}
    assert re.search(late, (folder / "report.txt").read_text())
    assert str(folder) in said

    job.pass_time(int(LIMIT) - 30)
    assert capfd.readouterr().err == ""
    job.pass_time(40)
    assert "stalled: rank 0 on host-0 has not moved for 30 min" in capfd.readouterr().err
    job.step(13, 0, 1, 2, 3)
    job.pass_time(1)
    assert re.fullmatch(
        r"rank 0 moves again after 30 min: step 13, graph step, in Python after the graph\n",
        capfd.readouterr().err,
    )
    job.pass_time(int(LIMIT) - 10)
    assert capfd.readouterr().err == "" and not job.store.check([KEY])


def test_a_rank_that_does_not_answer_is_late_and_the_job_ends(tmp_path, capfd):
    job = Job(tmp_path, ends=True)
    job.step(5, 0, 1, 2, 3)
    job.wait("waiting for the device", 0, 1, 2, 3)
    job.pass_time(2)
    job.stopped = {1}
    job.pass_time(int(LIMIT) + 30)
    said = capfd.readouterr().err
    last = "it was last seen at step 5, graph step, waiting for the device"
    assert re.search(rf"late: rank 1 on host-0: does not answer: .*; {last}\n", said), said
    assert job.store.check([KEY])
    ended = job.store.get(KEY).decode()
    assert ended.startswith("nothing has moved for 15 min (--on_stall end); late: rank 1 on host-0: "), ended
    assert str(job.reports[0].parent) in ended


def test_a_file_system_that_does_not_answer_holds_up_no_report(tmp_path, capfd, monkeypatch):
    answers, mkdir = threading.Event(), Path.mkdir
    monkeypatch.setattr(stalls, "DISK_SECONDS", 0.01)
    monkeypatch.setattr(Path, "mkdir", lambda *path, **how: answers.wait(60) and mkdir(*path, **how))
    job = Job(tmp_path, ends=True)
    job.step(11, 0, 1, 2, 3)
    job.wait("waiting for the device", 0, 1, 2)
    job.pass_time(int(LIMIT) + 15)
    assert "stalled: rank 0 on host-0 has not moved for 15 min\n" in capfd.readouterr().err
    assert b"nothing has moved for 15 min (--on_stall end); late: rank 3" in job.store.get(KEY)
    assert not job.reports
    answers.set()


def test_a_process_whose_name_was_cut():
    """Within a character: names in /proc are bytes."""
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes("1训练模型脚本".encode()[:15])
    try:
        assert os.getpid() in children(os.getppid())
    finally:
        name.write_bytes(before)


def test_another_rank_reports_where_rank_0_is_the_one_that_stands(tmp_path, capfd):
    job = Job(tmp_path)
    job.step(5, 0, 1, 2, 3)
    job.pass_time(2)
    job.stopped = {0}
    job.step(6, 1, 2, 3)
    job.wait("waiting for the device", 1, 2, 3)
    job.pass_time(int(LIMIT) + 25)
    assert capfd.readouterr().err == ""
    job.pass_time(30)
    said = capfd.readouterr().err
    assert said.count("stalled: rank 1 on host-0 has not moved for 15 min\n") == 1, said
    assert "late: rank 0 on host-0: does not answer: " in said and len(job.reports) == 1


def test_a_node_that_has_not_come(tmp_path, capfd):
    job = Job(tmp_path)
    job.stopped = {2, 3}
    job.wait("comparing versions", 0, 1)
    job.pass_time(int(LIMIT) + 20)
    said = capfd.readouterr().err
    assert "  ranks 0-1: comparing versions\n  late: ranks 2-3: has not come\n" in said


def test_a_compilation_is_allowed_more(tmp_path, capfd, compiling):
    """Of rank 3, which compiles while the others wait for it, and of all ranks."""
    job = Job(tmp_path)
    job.step(1, 0, 1, 2)
    job.wait("waiting for the device", 0, 1, 2)
    job.ranks[3].begin_step(1)
    job.ranks[3].tracing("step")
    compiling.append(True)
    job.pass_time(int(7.9 * LIMIT))
    assert capfd.readouterr().err == "" and not job.reports
    job.pass_time(int(1.2 * LIMIT))
    assert "late: rank 3 on host-1: step 1, graph step, compiling, for 2 h " in capfd.readouterr().err


def test_slow_work_may_take_longer_and_work_that_tells_of_itself_as_long_as_it_likes(tmp_path, capfd):
    job = Job(tmp_path, ends=True)
    job.wait("waiting for the tokens", 0, 1, 2)
    job.ranks[3].at("tokenizing", slow=True)
    job.pass_time(int(7 * LIMIT))
    assert capfd.readouterr().err == "" and not job.store.check([KEY])
    job = Job(tmp_path, ends=True)
    for _ in range(30):
        for rank in job.ranks:
            rank.at("reading the checkpoint")
        job.pass_time(int(LIMIT / 2))
    assert capfd.readouterr().err == "" and not job.store.check([KEY])


def places(*given):
    return [
        each and dict(zip(("count", "waits", "slow", "age", "host", "pid"), each, strict=True))
        for each in given
    ]


def test_who_is_late():
    far, near = (8, True, False, 9, "a", 1), (7, True, False, 9, "a", 2)
    works, compiles = (7, False, False, 9, "b", 3), (7, False, True, 9, "b", 4)
    assert who_is_late(places(far, near, far), set(), 50) == [1]  # the fewest mark_steps
    assert who_is_late(places(near, works, near), set(), 50) == [1]  # of those, the one that does not wait
    assert who_is_late(places(near, near), set(), 50) == []
    assert who_is_late(places(near, compiles), set(), 50) is None
    assert who_is_late(places(near, compiles), set(), 5) == [1]
    assert who_is_late(places(near, compiles, works), set(), 50) == [2]
    assert who_is_late(places(far, far, near), {1}, 50) == [1, 2]  # rank 2 was behind when 1 fell silent
    assert who_is_late(places(near, near, works), {2}, 50) == [2]
    assert who_is_late(places(near, works, works), {2}, 50) == [1, 2]
    assert who_is_late(places(near, None, near), {1}, 50) == [1]
    old = (6, False, False, 9, "a", 2)  # where a rank was a second before it fell silent
    assert who_is_late(places(far, old, near, works), {1, 2}, 50) == [1, 2, 3]


def test_a_report_of_a_thousand_ranks_is_short():
    hosts = [f"host-{rank // 32}" for rank in range(1024)]
    all_ranks = places(*((8, rank > 600, False, 9, host, rank) for rank, host in enumerate(hosts)))
    late = who_is_late(all_ranks, set(), 50)
    assert late == list(range(601))
    own, outside = whose_stacks(all_ranks, late, {3, 4, 5, 6, 7})
    assert len(own) == 32 + 18 * 3 + 2 and outside == {"0": {"3": 3}}
    assert shortened(list("abcdefghijklm")) == [*"abcdefghij", "... and 3 more such lines"]


def test_a_note_costs_a_few_microseconds():
    """What a mark_step pays for its three notes, on any machine far below a millisecond."""
    progress, count = Progress(), 20_000
    begun = time.perf_counter()
    for _ in range(count):
        progress.tracing("step")
        progress.traced("step")
        progress.started("step")
    each = (time.perf_counter() - begun) / count
    print(f"{1e9 * each:.0f} ns for the notes of a mark_step")
    assert each < 1e-4 and progress.place.count == 2 * count


def test_stacks_can_be_asked_for_by_hand(capfd):
    peers = Peers(HashStore(), 3, 4, 1, "host-1")
    watch_stalls(peers, "unused", 15, ends=False)
    assert peers.store.check(["progress/3"])  # also where its thread never comes to look
    os.kill(os.getpid(), signal.SIGUSR1)
    for each in peers.looks:
        each.look(peers.store)
    said = capfd.readouterr().err
    assert said.startswith("stacks of rank 3 on host-1, asked for by SIGUSR1:\n"), said
    assert "in test_stacks_can_be_asked_for_by_hand" in said
    for each in peers.looks:
        each.look(peers.store)
    assert capfd.readouterr().err == ""


def test_the_note_of_this_process():
    here().at("reading the checkpoint")
    assert here().place.phase.text == "reading the checkpoint" and not here().place.phase.slow


@pytest.mark.process
def test_real_ranks_that_hang_end_the_job(tmp_path):
    """One that sleeps, one that is stopped, and one whose Python is held: each tells where, or is asked."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m", "tests.support.hanging"]
    job = subprocess.Popen(
        [sys.executable, "-m", *command, str(tmp_path), "3"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ended = ""
    for line in job.stdout:
        said += line
        if line.endswith("ends with it\n"):
            ended = line
            for child in children(job.pid):
                os.kill(child, signal.SIGKILL)  # as torchrun does, 30 s later
    assert job.wait(60) == 1 and said.count("stalled: ") == 1, said
    host, program = os.uname().nodename, hanging.__file__
    late = f"late: rank 1 on {host}: step 3, graph step, tracing, for "
    assert re.match(rf"error: nothing has moved for \d s \(--on_stall end\); {late}", ended), said
    assert re.search(rf"  {late}\d+ s; in {program}:\d+, hang\n", said), said
    # What was told last is up to a second old.
    for rank, why in ((2, "its process is stopped"), (3, "a call that does not return holds its Python")):
        line = f"  late: rank {rank} on {host}: does not answer: {why}; it was last seen at step [23], "
        assert re.search(line, said), said
    sleeps, stopped, held = (
        path.read_text() for path in sorted(tmp_path.glob("stalls/*/rank-*.txt")) if "-00000" not in path.name
    )
    for text, words in ((sleeps, "time.sleep(600)"), (held, "ctypes.PyDLL(None).sleep(600)")):
        lines = Path(program).read_text().splitlines()
        [number] = [number for number, each in enumerate(lines, 1) if each.strip() == words]
        assert re.search(rf'{program}", line {number},? in hang', text), text
    assert "tests.support.hanging" in stopped and re.search(r"^  \d+ pyth.*: T ", stopped, re.M), stopped


BUSY = """
import threading, time
import torch, torch_xla
from parallel.graph import backend

def watch():
    while True:
        begun = time.monotonic()
        time.sleep(0.01)
        gaps.append(time.monotonic() - begun)
        if backend.is_compiling():
            compiled.append(True)

gaps, compiled = [], []
threading.Thread(target=watch, daemon=True).start()
x = torch.ones(1500, 1500).to(torch_xla.device())
torch_xla.sync()
y = x
for _ in range(20):
    y = y @ x / 1500
graph = backend.graph_hash([y])
backend.compile_graph([y])
inputs = [data for _, data in backend.graph_inputs([y])]
assert compiled and not backend.is_compiling()
gaps.clear()
begun = time.monotonic()
outputs = [backend.run_compiled(graph, inputs) for _ in range(3)]
seconds = time.monotonic() - begun
print(max(gaps), seconds, backend.count("CompileTime"))
"""


@pytest.mark.process
def test_a_rank_that_waits_for_a_busy_device_can_still_tell_where_it_is():
    """On a device that takes no graph before the last one is done, a replay does not hold Python's lock."""
    one_by_one = {"PJRT_DEVICE": "CPU", "PJRT_CPU_ASYNC_CLIENT": "0"}
    done = run_program(["-c", BUSY], environment=environment() | one_by_one)
    assert done.returncode == 0, done.stderr
    longest, seconds, _ = map(float, done.stdout.split())
    assert seconds > 0.3 and longest < seconds / 4, done.stdout
