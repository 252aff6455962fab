"""Jobs of torchrun in which a rank dies: the others end with it, the job starts again, and its curve is that
of no accident."""

import os
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
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--max_restarts=2",
            "-m",
            "tests.support.dying",
            str(tmp_path),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
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
    assert column(broken, "compilations")[-1] == 3
    for name in ("step", "loss", "grad_norm"):
        assert column(broken, name) == column(whole, name)
    start("--world_size", 2, *flags, "--resume", whole / "checkpoint-6", "--output_dir", fewer)
    for name in ("step", "loss", "grad_norm", "target_tokens"):
        torch.testing.assert_close(column(fewer, name), column(whole, name)[6:], rtol=1e-4, atol=0)
