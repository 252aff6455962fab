"""What a save of many ranks costs rank 0, and what a slow one costs the others."""

import json
import os
import socket
import threading
import time
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from data.loader import Position
from model.weights.safetensors_file import TensorWriter
from tests.support.saved import SHAPES, each_rank, job_of, optimizer_of, save, whole
from trainer.checkpoint import late_files, manifest, old_checkpoints, writer
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.late_files import LateFiles
from trainer.checkpoint.manifest import describe_tensors
from trainer.checkpoint.names import list_checkpoints, rank_file
from trainer.checkpoint.reader import Checkpoint
from trainer.checkpoint.writer import Saver

HOUR = 3600


def train(output, steps, at_step=None, **config):
    """Steps of four ranks, for which they wait for each other; at_step(step, saver) is called in each."""
    job = job_of(output, zero_1=True, **config)

    def run(runtime, mesh):
        saver = Saver(runtime, mesh, job, optimizer_of(mesh, 0, True))
        for step in range(1, steps + 1):
            runtime.barrier()
            if at_step:
                at_step(step, saver)
            if saver.saves_after(step, step == steps):
                saver.optimizer = optimizer_of(mesh, step, True)
                saver.save(Position(step, 1, 3))
        saver.wait()

    each_rank(run)


def test_a_slow_rank_holds_up_nobody(tmp_path, monkeypatch, capsys):
    """Steps go on while it writes; saves that are due are put off, on all ranks, until it has written.

    Clocks of the nodes are an hour apart: files come from the future and from the past.
    """
    write, closed, gate, late = Saver._write, TensorWriter.close, Event(), {}
    monkeypatch.setattr(writer, "WAIT_SECONDS", 2.0)
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + HOUR * (-1) ** int(time.perf_counter() * 1e3))

    def slow(saver, partial, state):
        if saver.runtime.rank == 3 and partial.name == "checkpoint-2.incomplete":
            assert gate.wait(60)
        write(saver, partial, state)

    def close(file):
        closed(file)
        moment = 1.8e9 + HOUR * (-1) ** int(file._path.name[9])
        os.utime(file._path, (moment, moment))

    def at_step(step, saver):
        if saver.runtime.rank == 0:
            late[step] = saver.stalled
        if saver.runtime.rank == 0 and step == 7:  # put off at 4, and still at 6
            assert saver.seconds >= 30
            gate.set()
            saver._completed.result(60)

    monkeypatch.setattr(Saver, "_write", slow)
    monkeypatch.setattr(TensorWriter, "close", close)
    train(tmp_path, 11, at_step, save_steps=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 7, 8, 10, 11]
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        "warning: the save after step 4 is put off, and training goes on: checkpoint-2.incomplete is not "
        f"complete, the files of 1 of 4 ranks are missing: rank 3 on {socket.gethostname()}"
    ]
    assert 2 <= late[5] < 30 and not any(late[step] for step in (2, 4, 6, 7))
    for step, path in list_checkpoints(tmp_path):
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        assert checkpoint.step == checkpoint.position.step == step
        for name in SHAPES:
            assert torch.equal(checkpoint.read("parameter", name), whole("parameter", name, step))
    assert find_checkpoint(str(tmp_path), "latest").step == 11


def test_the_last_save_waits_for_the_one_before(tmp_path, monkeypatch, capsys):
    write = Saver._write
    monkeypatch.setattr(writer, "WAIT_SECONDS", 0)

    def slow(saver, partial, state):
        time.sleep(0.5 * (saver.runtime.rank == 3))
        write(saver, partial, state)

    monkeypatch.setattr(Saver, "_write", slow)
    train(tmp_path, 5, save_steps=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 5]
    assert capsys.readouterr().err.count("the save after step 4 is put off") == 1


def test_a_rank_that_lacks_the_directory_ends_the_run_if_no_other_one_does(tmp_path, monkeypatch):
    """Of the ranks that cannot write, one speaks that finds the directory. Where it is on another machine's
    disk, there is none."""
    write, check, steps, errors = Saver._write, Saver.check, [], []
    monkeypatch.setattr(writer, "WAIT_SECONDS", 0)

    def checked(saver):
        try:
            check(saver)
        except OSError as error:
            errors.append(str(error))
            raise

    def lacks(saver, partial, state):
        if saver.runtime.rank == 3:
            saver._partial = partial = tmp_path / "of the other machine"
        write(saver, partial, state)

    def at_step(step, saver):
        if saver.runtime.rank == 3 and step > 1:
            saver._written.exception(60)
            steps.append(step)
            monkeypatch.setattr(writer, "ALONE_SECONDS", 60 if step < 4 else 0)

    monkeypatch.setattr(Saver, "_write", lacks)
    monkeypatch.setattr(Saver, "check", checked)
    with pytest.raises(threading.BrokenBarrierError):  # of the other ranks
        train(tmp_path, 9, at_step, save_steps=1)
    assert steps == [2, 3, 4] and "of the other machine could not be written: [Errno 2]" in errors[0]


@pytest.fixture
def clock(monkeypatch):
    """The time that LateFiles sees: nobody sleeps. `clock.pauses` has the seconds of each sleep."""
    found = SimpleNamespace(now=1000.0, pauses=[])

    def sleep(seconds):
        found.now += seconds
        found.pauses.append(seconds)

    patched = SimpleNamespace(perf_counter=lambda: found.now, sleep=sleep)
    monkeypatch.setattr(late_files, "time", patched)
    return found


def test_looks_at_a_directory_become_rare(tmp_path, monkeypatch, clock, capsys):
    looks, listdir = [], os.listdir
    monkeypatch.setattr(late_files.os, "listdir", lambda path: looks.append(path) or listdir(path))
    for rank in range(2048):
        if rank not in (7, 300, 301, 302, 303, 304, 2047):
            (tmp_path / rank_file(rank)).touch()
    (tmp_path / (rank_file(7) + ".partial")).touch()
    late = LateFiles(tmp_path, range(2048), lambda rank: f"rank {rank} on node-{rank // 32}")
    alive = SimpleNamespace(is_alive=lambda: clock.now < 1160)
    assert late.wait(alive, 1000.0) is False  # the rank that trains has failed
    assert clock.pauses[0] == 0.02 and clock.pauses[-1] == 1.0 and len(looks) < 175
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and f"{tmp_path.name} was begun 30 s ago: the files of 7 of 2,048 ranks" in said[0]
    assert said[0].endswith(
        "are missing: rank 7 on node-0, rank 300 on node-9, rank 301 on node-9, rank 302 on node-9, "
        "rank 303 on node-9 and 2 more"
    )
    assert " was begun 90 s ago" in said[1] and " was begun 150 s ago" in said[2]
    (tmp_path / (rank_file(7) + ".partial")).rename(tmp_path / rank_file(7))
    owner = SimpleNamespace(is_alive=lambda: True)
    with pytest.raises(OSError, match="of 6 of 2,048 ranks .* rank 300 on node-9.* after 3600 s: do all nod"):
        late.wait(owner, clock.now)
    for rank in (300, 301, 302, 303, 304, 2047):
        (tmp_path / rank_file(rank)).touch()
    assert late.wait(owner, clock.now) and str(late) == "its manifest is being written"


def test_headers_are_read_a_few_at_once(tmp_path, monkeypatch):
    """Of 100 ranks, few files are open at once, and all are closed. One that is cut off is an error."""
    most, real = [0], open

    def counted(*arguments):
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")))
        return real(*arguments)

    path = save(tmp_path, 1, tp=1, dp=100, zero_1=True)
    monkeypatch.setattr(manifest, "open", counted, raising=False)
    before = len(os.listdir("/proc/self/fd"))
    tensors, files = describe_tensors(path, range(100))
    assert 0 < most[0] <= before + 64 and len(os.listdir("/proc/self/fd")) <= before
    assert list(files) == [rank_file(rank) for rank in range(100)]
    assert json.loads(json.dumps(tensors)) == Checkpoint(path).manifest["tensors"]
    os.truncate(path / rank_file(5), (path / rank_file(5)).stat().st_size - 4)
    with pytest.raises(OSError, match="rank-00005.safetensors has .* bytes of "):
        describe_tensors(path, range(100))


def test_rank_0_waits_for_the_disk_only_for_what_it_wrote(tmp_path, monkeypatch):
    """Each rank has waited for its own file."""
    flush, flushed = writer._flush, []
    monkeypatch.setattr(writer, "_flush", lambda path: flushed.append(path.name) or flush(path))
    save(tmp_path, 1, zero_1=True)
    written = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    ranks = {rank_file(rank) for rank in range(4)}
    assert set(flushed) == written - ranks | {"checkpoint-1.incomplete", tmp_path.name} and ranks < written


def test_a_manifest_is_read_once_for_its_loss(tmp_path, monkeypatch):
    read, reads = old_checkpoints.read_eval_loss, []
    monkeypatch.setattr(old_checkpoints, "read_eval_loss", lambda path: reads.append(path.name) or read(path))
    save(tmp_path, 1, 2, losses=[1.0, 3.0])
    assert reads == []
    save(tmp_path, 3, 4, 5, limit=1, losses=[float("nan"), 2.0, 3.0])
    assert reads == ["checkpoint-1", "checkpoint-2"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 5]


def test_a_save_that_takes_long_asks_for_more_time(tmp_path):
    """--max_minutes counts with what the save that is being written has already taken."""
    runtime = SimpleNamespace(rank=1, executes=True)
    saver = Saver(runtime, None, job_of(tmp_path), None)
    assert saver.seconds == writer.SAVE_SECONDS
    saver._completed, saver._begun = SimpleNamespace(done=lambda: False), time.perf_counter() - 100
    assert saver.seconds >= 100
    saver._completed = SimpleNamespace(done=lambda: True)
    assert saver.seconds == writer.SAVE_SECONDS
