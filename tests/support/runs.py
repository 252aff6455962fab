"""Runs of the trainer and the tools, and what they wrote."""

import json
import os
import subprocess
import sys
import threading

from tests.support.on_ranks import ROOT, run_program

SHORT = [
    "--max_seq_length",
    "64",
    "--learning_rate",
    "1e-2",
    "--lr_scheduler_type",
    "cosine",
    "--warmup_ratio",
    "0.1",
]


def environment():
    """That of a user's shell: without what tests set to import torch_xla themselves."""
    hidden = ("PJRT_DEVICE", "CPU_NUM_DEVICES", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def start(*flags, program=("trainer/main.py",), cwd=ROOT, forked=True, timeout=900):
    """A program that has to end well, in a forked process or in a new interpreter, there within `timeout`
    seconds."""
    command = [*map(str, program), *map(str, flags)]
    if forked:
        done = run_program(command, cwd, environment())
    else:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
        )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def read(output, name="metrics.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def column(output, name="loss"):
    return [line[name] for line in read(output)]


PARSES = threading.Lock()  # HfArgumentParser changes the class of the flags while it reads them


def prepare_on_a_rank(runtime, flags):
    """The job of a command line, where every rank is a thread that prepares one for itself."""
    from trainer.config import parse
    from trainer.job import prepare

    with PARSES:
        config = parse(flags)
    return prepare(config, runtime.world_size)


def run_one(runtime, flags):
    """What trainer/main.py does for a command line; the state after the last step."""
    from trainer.loop import run

    job = prepare_on_a_rank(runtime, flags)
    runtime.barrier()
    return run(runtime, job)


def several_runs(runtime, commands):
    """Several command lines in one process, which saves its start."""
    for flags in commands:
        run_one(runtime, flags)


def final_states(runtime, commands, look):
    """{output directory's name: look(optimizer) after the last step} on this rank."""
    return {
        os.path.basename(flags[flags.index("--output_dir") + 1]): look(run_one(runtime, flags).optimizer)
        for flags in commands
    }
