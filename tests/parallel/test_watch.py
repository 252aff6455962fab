"""Jobs of torchrun in which a rank dies: the others end with it, the job starts again, and its curve is that
of no accident."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from parallel.runtime.watch import children
from tests.support.on_ranks import ROOT
from tests.support.runs import SHORT, column, environment, start
from trainer.checkpoint.names import list_checkpoints

pytestmark = pytest.mark.process
HOST = socket.gethostname()


def test_a_dead_rank_ends_the_others_and_the_job_restarts(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2")
    done = start("-m", "tests.support.dying", tmp_path, program=torchrun, forked=False, timeout=600)
    ended = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ended == [
        f"error: rank 1 on {HOST} was killed; rank 0 on {HOST} ends with it",
        f"error: rank 1 on {HOST} has failed: rank one has had enough; rank 0 on {HOST} ends with it",
    ], done.stderr
    assert done.stderr.index("RuntimeError: rank one has had enough") < done.stderr.index(ended[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{attempt}-{rank}-{step}"
        for attempt, last in enumerate((2, 2, 4))
        for rank in range(2)
        for step in range(last)
    ]


def test_a_fault_in_the_start_ends_all_within_seconds(tmp_path):
    """Two machines, ranks 0 and 1, and rank 2: one process of each says why, and the one that fails."""
    faults = ["fails", "differs", "is told to end", "loses the store"]
    done = start(tmp_path, *faults, program=("-m", "tests.support.starting"), forked=False, timeout=120)
    found = json.loads(done.stdout)

    def lines_of(fault, statuses=(1, 1, 1)):
        job = found[fault]
        assert job["statuses"] == list(statuses) and job["seconds"] < 10, job
        on_first_machine, others = job["lines"][0] + job["lines"][1], job["lines"][2]
        assert len(on_first_machine) == len(others) == 1, job
        return re.sub("^error: rank 1", "error: rank 0", on_first_machine[0]), others[0]

    failed = f"error: rank 2 on {HOST} has failed: no room; rank 0 on {HOST} ends with it"
    assert lines_of("fails") == (failed, f"error: rank 2 on {HOST}: no room")
    assert lines_of("differs") == (f"error: rank 2 on {HOST} has (1, 0)",) * 2
    ended = f"error: rank 0 on {HOST} was told to end (SIGTERM); rank"
    ends = tuple(f"{ended} {rank} on {HOST} ends with it" for rank in (0, 2))
    assert lines_of("is told to end", (143, 1, 1)) == ends
    for rank, line in zip((0, 2), lines_of("loses the store"), strict=True):
        assert line.startswith(f"error: rank {rank} on {HOST} lost the connection to the store at localhost:")


def test_a_killed_job_restarts_from_its_last_checkpoint(tmp_path):
    """On a CPU one process hosts all ranks, two stages x dp 2, so it is the one to kill. Half the ranks go
    on, too."""
    flags = [
        *SHORT,
        "--pipeline_parallel_size",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--global_batch_size",
        "8",
        "--max_steps",
        "10",
        "--save_steps",
        "2",
        "--lora_dropout",
        "0.1",
    ]
    broken, whole, fewer = tmp_path / "broken", tmp_path / "whole", tmp_path / "fewer"
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=4",
            "--max_restarts=1",
            "trainer/main.py",
            *flags,
            "--resume",
            "latest",
            "--output_dir",
            str(broken),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(list_checkpoints(broken)) < 2:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.02)
    [host] = children(job.pid)
    os.kill(host, signal.SIGKILL)
    time.sleep(0.2)
    newest, path = list_checkpoints(broken)[-1]
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "SIGKILL" in said or "-9" in said, said
    assert 4 <= newest < 10 and said.count("\nresume: ") == 1, said
    assert f"\nresume: {path}, after step {newest} of 10\n" in said, said
    start("--world_size", 4, *flags, "--output_dir", whole)
    assert column(broken, "compilations")[-1] == 4  # one gathers what the ranks have read
    for name in ("step", "loss", "grad_norm"):
        assert column(broken, name) == column(whole, name)
    start("--world_size", 2, *flags, "--resume", whole / "checkpoint-6", "--output_dir", fewer)
    for name in ("step", "loss", "grad_norm", "target_tokens"):
        torch.testing.assert_close(column(fewer, name), column(whole, name)[6:], rtol=1e-4, atol=0)
