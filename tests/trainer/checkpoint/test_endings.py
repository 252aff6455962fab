"""Runs whose disk takes no more, or whose steps are not finite: they end in order, and keep what is good."""

import builtins
import errno
import json
import os

import pytest

from tests.support.on_ranks import ROOT, on_ranks, run_program
from tests.support.runs import environment, read, several_runs
from trainer.checkpoint.names import list_checkpoints
from trainer.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.process

SHORT = "--world_size 4 --tensor_parallel_size 2 --zero_1 --max_seq_length 64"
FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing_is_wrong():
    pass


def metrics_take_no_more():
    """From its fourth line on, metrics.jsonl cannot be written."""
    from trainer.reporting import files

    lines = []

    def open_or_fail(path, mode, **how):
        lines.extend([path] if str(path).endswith("metrics.jsonl") else [])
        if len(lines) > 3:
            raise FULL_DISK
        return builtins.open(path, mode, **how)

    files.open = open_or_fail


def a_rank_cannot_save():
    """Rank 3 cannot write its file of checkpoint-4."""
    from model.weights import safetensors_file

    write = safetensors_file.TensorWriter.write

    def fail(self, *arguments):
        if str(self._path).endswith("checkpoint-4.incomplete/rank-00003.safetensors.partial"):
            with safetensors_file.naming(self._path):
                raise FULL_DISK
        write(self, *arguments)

    safetensors_file.TensorWriter.write = fail


def the_log_takes_no_more():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def train(output, *flags, but="nothing_is_wrong"):
    """trainer/main.py with flags, after the call of a function of this file."""
    text = f"import tests.trainer.checkpoint.test_endings as test; test.{but}(); import trainer.main, sys; "
    text += "sys.exit(trainer.main.main())"
    return run_program(
        ["-c", text, *SHORT.split(), *map(str, flags), "--output_dir", output], ROOT, environment()
    )


def test_metrics_that_cannot_be_written(tmp_path):
    """The run saves, ends with status 1 and names the file, and goes on when there is room."""
    flags = ("--max_steps", 12, "--save_steps", 100)
    done = train(tmp_path / "out", *flags, but="metrics_take_no_more")
    problem = f"error: {tmp_path}/out/metrics.jsonl could not be written: No space left on device"
    assert done.returncode == 1 and f"{problem}: the run saves its state, and ends\n" in done.stderr
    assert done.stderr.rstrip().endswith(problem), done.stderr
    [(step, path)] = list_checkpoints(tmp_path / "out")
    Checkpoint(path).verify()
    assert 4 < step < 9 and [line["step"] for line in read(tmp_path / "out")] == [1, 2, 3]
    for output, more in (("out", ["--resume", "latest"]), ("whole", [])):
        assert train(tmp_path / output, *flags, *more).returncode == 0
    lines, whole = read(tmp_path / "out"), read(tmp_path / "whole")
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole[:3] + whole[step:]]


def test_a_save_that_fails_ends_the_run(tmp_path):
    done = train(tmp_path, "--max_steps", 60, "--save_steps", 4, but="a_rank_cannot_save")
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "checkpoint-4.incomplete could not be written" in done.stderr
    assert f"No space left on device: '{tmp_path}/checkpoint-4.incomplete/rank-00003" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "starts.jsonl"]
    assert len(read(tmp_path)) < 20


def test_a_log_that_takes_no_more(tmp_path):
    assert train(tmp_path, "--max_steps", 3, but="the_log_takes_no_more").returncode == 0
    assert len(read(tmp_path)) == 3


def test_too_high_a_rate(tmp_path):
    """A full training whose second step is not finite: the last good checkpoint is the one that is left."""
    flags = ("--lora_r", 0, "--learning_rate", 1e20, "--lr_scheduler_type", "constant", "--max_steps", 9)
    done = train(tmp_path, *flags, "--save_steps", 1, "--save_total_limit", 1)
    assert done.returncode == 1 and done.stderr.count("error:") == 1
    assert (
        "error: step 2 is not finite: loss nan, gradient norm nan. It began in the forward of" in done.stderr
    )
    assert f"the last checkpoint is {tmp_path}/checkpoint-1. A lower" in done.stderr
    [(step, path)] = list_checkpoints(tmp_path)
    Checkpoint(path).verify()

    def no_constant(text):
        raise AssertionError(f"metrics.jsonl has {text}")

    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert step == 1 and [line["loss"] is None for line in lines] == [False, True]


def test_every_checkpoint_that_may_be_deleted_has_a_loss(tmp_path):
    """The best is kept where evaluations and saves are due in different steps: with --save_total_limit each
    save evaluates."""
    rising = "--do_eval --max_steps 7 --save_steps 2 --eval_steps 3 --learning_rate 3 --max_seq_length 64"
    commands = [
        [*rising.split(), "--save_total_limit", "1", "--output_dir", str(tmp_path / "limit")],
        [*rising.split(), "--output_dir", str(tmp_path / "all")],
    ]
    on_ranks(several_runs, 2, commands=commands)
    losses = {line["step"]: line["eval_loss"] for line in read(tmp_path / "limit", "eval.jsonl")}
    assert list(losses) == [0, 2, 3, 4, 6, 7]
    kept = {
        step: Checkpoint(path).manifest["eval_loss"] for step, path in list_checkpoints(tmp_path / "limit")
    }
    best = min((2, 4, 6, 7), key=losses.get)
    assert kept == {step: losses[step] for step in sorted({best, 7})}
    assert [line["step"] for line in read(tmp_path / "all", "eval.jsonl")] == [0, 3, 6, 7]
    assert [line["loss"] for line in read(tmp_path / "all")] == [
        line["loss"] for line in read(tmp_path / "limit")
    ]
