"""Runs that stop and resume: on another topology, after SIGTERM, before a time limit."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.models import save_llama
from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import column, environment, read, several_runs, start

pytestmark = pytest.mark.process

# (tp, dp): flags; each with 8 rows a step.
TOPOLOGIES = {
    (4, 2): "--zero_1 --per_device_train_batch_size 4",
    (2, 1): "--per_device_train_batch_size 8",
    (8, 1): "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
    (1, 4): "--per_device_train_batch_size 2",
}
MODES = {"lora": "--lora_r 4 --lora_dropout 0.1", "full": "--lora_r 0 --weight_decay 0.1"}


def test_another_topology_continues_the_curve(tmp_path):
    """From three topologies to TP4 x DP2 with ZeRO-1 and back; 8 ranks replicate the 4 KV heads."""
    save_llama(tmp_path / "base", num_hidden_layers=1)

    def run(world_size, *legs):
        """legs: (topology, the topology that it resumes from, or None)."""
        commands = []
        for (tp, dp), origin in legs:
            for mode, flags in MODES.items():
                output = f"{tmp_path}/{mode}-{tp}x{dp}"
                resume = (
                    ["--resume", f"{tmp_path}/{mode}-{origin[0]}x{origin[1]}/checkpoint-3"] if origin else []
                )
                commands.append(
                    [
                        "--model_id",
                        str(tmp_path / "base"),
                        "--max_seq_length",
                        "64",
                        "--learning_rate",
                        "1e-3",
                        "--max_steps",
                        "6",
                        "--save_steps",
                        "3",
                        "--tensor_parallel_size",
                        str(tp),
                        *TOPOLOGIES[tp, dp].split(),
                        *flags.split(),
                        *resume,
                        "--output_dir",
                        output + (f"-from-{origin[0]}x{origin[1]}" if origin else ""),
                    ]
                )
        on_ranks(several_runs, world_size, commands=commands)

    center, others = (4, 2), [(2, 1), (8, 1), (1, 4)]
    run(2, ((2, 1), None))
    run(4, ((1, 4), None))
    run(8, (center, None), ((8, 1), None), *((center, other) for other in others), ((8, 1), center))
    run(2, ((2, 1), center))
    run(4, ((1, 4), center))
    for mode in MODES:
        for other in others:
            for here, there in ((center, other), (other, center)):
                whole = column(tmp_path / f"{mode}-{there[0]}x{there[1]}")
                rest = column(tmp_path / f"{mode}-{here[0]}x{here[1]}-from-{there[0]}x{there[1]}")
                assert len(whole) == 6 and len(rest) == 3 and whole[5] < whole[0]
                torch.testing.assert_close(
                    torch.tensor(rest),
                    torch.tensor(whole[3:]),
                    rtol=1e-5,
                    atol=0,
                    msg=lambda text, at=(mode, here, there): f"{at}: {text}",
                )


def test_sigterm_and_a_time_limit_save_and_end(tmp_path):
    flags = [
        "--world_size",
        "2",
        "--tensor_parallel_size",
        "2",
        "--max_seq_length",
        "64",
        "--lr_scheduler_type",
        "constant",
        "--lora_dropout",
        "0.1",
        "--resume",
        "latest",
        "--save_total_limit",
        "1",
    ]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [
        sys.executable,
        "trainer/main.py",
        *flags,
        "--max_steps",
        "100000",
        "--output_dir",
        str(stopped),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (stopped / "metrics.jsonl").exists() or len(read_lines(stopped)) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    first = read(stopped)[-1]["step"]
    assert f"stopped after step {first} of 100000: --resume latest goes on" in said
    assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{first}"]
    # The limit has passed before the first step. Two steps are made, because the stop request is read one
    # step late.
    start(*flags, "--max_steps", 100000, "--max_minutes", 0.001, "--output_dir", stopped)
    assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{first + 2}"]
    start(*flags, "--max_steps", first + 2, "--output_dir", whole)
    for name in ("step", "loss", "grad_norm"):
        assert column(stopped, name) == column(whole, name)


def read_lines(output):
    return (output / "metrics.jsonl").read_text().splitlines()
