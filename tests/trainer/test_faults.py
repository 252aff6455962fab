"""Killed processes, full disks and two runs in one directory: only complete checkpoints are read."""

import fcntl
import os
import random
import resource
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from model.config import ModelConfig
from model.weights.shapes import base_shapes
from tests.support.saved import SHAPES, save, whole
from tools.merge_checkpoint.merging import merge
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.names import KINDS, list_checkpoints
from trainer.config_derived import SAMPLE
from trainer.job import lock

KILLS = 50


def fork():
    """os.fork with a tqdm lock per process: a child that is killed with a shared one would block us."""
    child = os.fork()
    if not child:
        tqdm.set_lock(threading.RLock())
        torch.set_num_threads(1)  # threads do not survive a fork
    return child


def killed(work, seconds):
    """Run `work(ready)` in another process, and kill it `seconds` after it called ready()."""
    reading, writing = os.pipe()
    child = fork()
    if not child:
        try:
            work(lambda: os.write(writing, b"x"))
        finally:
            os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)


def save_tiny(output, step):
    """A checkpoint of a full training of the sample's model; and {weight: (global shape, dimension)}."""
    shapes = {
        name: (shape, 0 if len(shape) > 1 else None)
        for name, shape in base_shapes(ModelConfig.from_pretrained(SAMPLE / "tiny")).items()
    }
    return save(output, step, shapes=shapes, bucket_bytes=10**6), shapes


def check_latest(output):
    checkpoint = find_checkpoint(str(output), "latest")
    for kind in KINDS:
        for name in SHAPES:
            assert torch.equal(checkpoint.read(kind, name), whole(kind, name, checkpoint.step))
    return checkpoint.step


@pytest.mark.process
def test_a_kill_at_any_moment_of_saving(tmp_path, capsys):
    """Each process resumes where the last one was killed; kills also hit the deletion of checkpoints."""
    save(tmp_path, 1)
    begun = time.perf_counter()
    save(tmp_path, 2, limit=2)
    seconds = time.perf_counter() - begun
    done, random_moment, incomplete = 2, random.Random(0), 0
    for _ in range(KILLS):

        def saving(ready, first=done + 1):
            ready()
            save(tmp_path, *range(first, first + 1000), limit=2, zero_1=first % 2 == 0)

        killed(saving, random_moment.uniform(0, 4 * seconds))
        incomplete += any(path.name.endswith(".incomplete") for path in tmp_path.iterdir())
        latest = check_latest(tmp_path)
        assert latest >= done and "skipped: " not in capsys.readouterr().out
        done = latest
    assert done > 10 and incomplete > 10


@pytest.mark.process
def test_a_kill_at_any_moment_of_merging(tmp_path):
    checkpoint, shapes = save_tiny(tmp_path, 3)
    begun = time.perf_counter()
    merge(checkpoint, tmp_path / "once", max_shard_size="300KB")
    seconds, random_moment, complete = time.perf_counter() - begun, random.Random(1), 0
    for number in range(KILLS):

        def merging(ready):
            ready()
            merge(checkpoint, tmp_path / "merged", max_shard_size="300KB")

        killed(
            merging, random_moment.uniform(0, 1.5 * seconds) if number else 30 * seconds
        )  # the first can end
        if (tmp_path / "merged").exists():
            merged = {}
            for file in (tmp_path / "merged").glob("*.safetensors"):
                merged |= load_file(file)
            assert sorted(merged) == sorted(shapes) and (tmp_path / "merged" / "config.json").is_file()
            assert all(torch.equal(merged[name], whole("parameter", name, 3, shapes)) for name in shapes)
            shutil.rmtree(tmp_path / "merged")
            complete += 1
    assert 0 < complete < KILLS
    assert find_checkpoint(str(tmp_path), "latest").step == 3


def fails(work):
    """The error of `work()`, in another process whose files may have at most 3000 bytes."""
    reading, writing = os.pipe()
    child = fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.process
def test_a_disk_that_takes_no_more(tmp_path):
    """A limit on the size of files stands for a full disk: writing fails in the middle of the first file."""
    save(tmp_path, 1)
    assert "checkpoint-2.incomplete could not be written: [Errno 27]" in fails(
        lambda: save(tmp_path, 2, tp=1, dp=1)
    )
    assert check_latest(tmp_path) == 1 and [step for step, _ in list_checkpoints(tmp_path)] == [1]
    checkpoint, _ = save_tiny(tmp_path / "model", 1)
    assert "OSError: [Errno 27]" in fails(lambda: merge(checkpoint, tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "model"]
    save(tmp_path, 2)
    assert check_latest(tmp_path) == 2


def test_two_runs_in_one_directory(tmp_path):
    lock(str(tmp_path))
    with pytest.raises(ValueError, match="is in use by another run that has not ended"):
        lock(str(tmp_path))
    checkpoint, _ = save_tiny(tmp_path, 1)
    (tmp_path / "merged.incomplete").mkdir()
    other = os.open(tmp_path / "merged.incomplete", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="merged is being written by another merge"):
        merge(checkpoint, tmp_path / "merged")
    os.close(other)
