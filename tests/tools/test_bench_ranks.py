"""bench_ranks: its ranks compute what threads on XLA:CPU do, counts are complete, faults are named."""

import json
import re

import pytest

from tests.support.runs import column, start
from tools.bench_ranks.extrapolation import line

BENCH = ("-m", "tools.bench_ranks")


@pytest.mark.process
def test_a_small_walk(tmp_path):
    """Four processes on two pretended machines, killed and resumed, beside four threads that were not."""
    flags = ["--processes", 4, "--checkpoint_gb", 0.001, "--directory", tmp_path]
    said = start(*flags, "--json", tmp_path / "new.json", program=BENCH).stdout
    found = json.loads((tmp_path / "new.json").read_text())
    assert found["loss_difference"] == 0 and "resume on half" in said

    threads = f"""--world_size 4 --tensor_parallel_size 2 --zero_1 true --lora_r 0 --max_seq_length 32
        --per_device_train_batch_size 2 --global_batch_size 8 --max_steps 10 --save_steps 5
        --model_id {tmp_path}/ranks/model --output_dir {tmp_path}/threads"""
    start(*threads.split())
    for name in ("loss", "grad_norm"):
        expected = column(tmp_path / "threads", name)
        assert column(tmp_path / "ranks" / "killed" / "out", name) == pytest.approx(expected, rel=1e-5)

    runs = found["runs"]
    assert runs["start"]["texts tokenized"] == 139 and runs["restart"]["texts tokenized"] == 0
    for run in runs.values():
        assert run["files open at once, one rank"] <= 64
        assert 0 < run["start: MB of other files read"] < 20  # counted by us and by the kernel
    for name in ("restart", "resume on half"):
        assert 1 <= runs[name]["start: times the checkpoint was read"] <= 1.2


@pytest.mark.process
def test_a_planted_fault(tmp_path):
    """A machine that lacks a file of the model: one line says so, and nobody hangs."""
    said = start("--faults", "shard", "--directory", tmp_path, program=BENCH).stdout
    assert said.startswith("passed") and re.search("rank [4-7] on machine-1 has failed: .*safetensors", said)


def test_what_is_extrapolated():
    assert line(32, 32.0, 64, 64.0) == (0.0, 1.0)
    assert line(32, 5.0, 64, 5.0) == (5.0, 0.0)
    assert line(32, 37.0, 64, 69.0) == (5.0, 1.0)
    assert line(32, 4.0, 64, 12.0) == (0.0, 12 / 64)
