"""Runs the jobs with a planted fault (tools/bench_ranks/faults.py), and says what came of each."""

import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

from tools.bench_ranks.cluster import Attempt, Cluster
from tools.bench_ranks.faults import FAULTS, PLANTED, Fault
from tools.bench_ranks.inputs import write_model
from tools.bench_ranks.walk import check, loss_difference
from trainer.config import Config

PROCESSES, MACHINES, STEPS, SAVED = 8, 2, 4, 2
HUNG_SECONDS = 150.0
ALLOWED_SECONDS = 120.0
STALL_MINUTES = 0.1
FLAGS = (
    f"--model_id model --max_steps {STEPS} --save_steps {SAVED} --lora_r 0 --zero_1 true "
    "--parallel_layers native --tensor_parallel_size 2 --pipeline_parallel_size 2 --max_seq_length 32 "
    "--per_device_train_batch_size 2"
).split()


def run_faults(directory: Path, names: list[str] | None = None) -> list[dict]:
    """Run a job without a fault, then one with each of FAULTS (or of those whose name has one of `names`).

    Returns for each: name, passed, seconds (from the fault, or from the start, until all had ended), ended
    (how), line (what a process printed that names rank and host).
    """
    directory.mkdir(parents=True)
    write_model(directory / "model", 1e6)
    [sound] = _cluster(directory, "sound", None).run(limit=HUNG_SECONDS)
    check([sound], 0)
    chosen = [each for each in FAULTS if not names or any(name in each.name for name in names)]
    return [_run_fault(directory, number, fault) for number, fault in enumerate(chosen)]


def _cluster(directory: Path, name: str, fault: Fault | None) -> Cluster:
    """The cluster of a job, with its machines' folders: those of the job without a fault, after it."""
    for machine in range(MACHINES):
        folder = directory / name / f"machine-{machine}"
        if fault:
            shutil.copytree(directory / "sound" / folder.name, folder, symlinks=True)
            continue
        (folder / "model").mkdir(parents=True)
        for file in (directory / "model").iterdir():
            (folder / "model" / file.name).symlink_to(file)
    flags = [*FLAGS, "--output_dir", str(directory / name / "out")]
    if fault and fault.resumes:
        flags += ["--resume", str(directory / "sound" / "out" / f"checkpoint-{SAVED}")]
    if "stall_minutes" in {field.name for field in fields(Config)}:
        flags += ["--stall_minutes", str(STALL_MINUTES), "--on_stall", "end"]

    def plant(rank, machine, attempt):
        os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")
        if fault and machine == 1 and (not fault.one or rank == PROCESSES // MACHINES + 1):
            fault.plant()

    return Cluster(PROCESSES, MACHINES, flags, directory / name, plant)


def _run_fault(directory: Path, number: int, fault: Fault) -> dict:
    name = f"fault-{number}"
    cluster = _cluster(directory, name, fault)
    fault.spoil(directory / name / "machine-1")
    [attempt] = cluster.run(limit=HUNG_SECONDS)
    goes_on = (
        attempt.succeeded and loss_difference(directory / name / "out", directory / "sound" / "out") == 0
    )
    line = _line(attempt, fault.line)
    begun = directory / name / "machine-1" / PLANTED
    seconds = (
        attempt.begun + attempt.seconds - float(begun.read_text()) if begun.exists() else attempt.seconds
    )
    in_time = not attempt.hung and seconds <= ALLOWED_SECONDS
    return {
        "name": fault.name,
        "passed": bool(line) and in_time and (goes_on if fault.goes_on else not attempt.succeeded),
        "seconds": seconds,
        "ended": "hung" if attempt.hung else "all steps done" if goes_on else "ended",
        "line": line or _last_line(attempt),
        "lines": len(_errors(attempt)),
    }


def _line(attempt: Attempt, expected: str) -> str | None:
    """The first line that a rank has printed, by rank, in which the regular expression is found."""
    for rank in range(attempt.processes):
        for line in attempt.printed(rank).splitlines():
            if re.search(expected, line):
                return line
    return None


def _errors(attempt: Attempt) -> list[str]:
    lines = [line for rank in range(attempt.processes) for line in attempt.printed(rank).splitlines()]
    return [line for line in lines if re.match(r"(error|\w*Error):", line)]


def _last_line(attempt: Attempt) -> str:
    return f"(none names it) {(_errors(attempt) or ['nothing was printed'])[0]}"


def in_words(found: dict) -> str:
    """A line about a fault, and the line that was printed."""
    passed = "passed" if found["passed"] else "FAILED"
    return (
        f"{passed}  {found['seconds']:6.1f} s  {found['name']}: {found['ended']}\n    {found['line'][:300]}"
    )
