"""Runs the jobs with a planted fault (tools/bench_ranks/faults.py), and says what came of each."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.bench_ranks.cluster import Attempt, Cluster
from tools.bench_ranks.faults import FAULTS, PLANTED, Fault
from tools.bench_ranks.inputs import write_model
from tools.bench_ranks.walk import check, loss_difference

PROCESSES, MACHINES, STEPS, SAVED = 8, 2, 4, 2
HUNG_SECONDS = 150.0
ALLOWED_SECONDS = 120.0
FLAGS = (
    f"--model_id model --max_steps {STEPS} --save_steps {SAVED} --lora_r 0 --zero_1 true "
    "--parallel_layers native --tensor_parallel_size 2 --pipeline_parallel_size 2 --max_seq_length 32 "
    "--per_device_train_batch_size 2 --stall_minutes 0.75 --on_stall end"
).split()


def run_faults(directory: Path, words: list[str]) -> Iterator[dict]:
    """Run a job without a fault, then one with each of FAULTS, or of those whose name has one of the `words`.

    Gives for each: name, passed, seconds (from the fault, or from the start, until all had ended), ended
    (how), line (what a process printed that names rank and host).
    """
    directory.mkdir(parents=True)
    write_model(directory / "model", 1e6)
    [sound] = _cluster(directory, "sound", None).run(limit=HUNG_SECONDS)
    check([sound], 0)
    for number, fault in enumerate(FAULTS):
        if not words or any(word in fault.name for word in words):
            yield _run_fault(directory, f"fault-{number}", fault)


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

    def plant(rank, machine, attempt):
        os.environ["XDG_CACHE_HOME"] = "cache"  # in the folder of the machine, which others cannot see
        if fault and machine == 1 and (not fault.one or rank == PROCESSES // MACHINES + 1):
            fault.plant()

    return Cluster(PROCESSES, MACHINES, flags, directory / name, plant)


def _run_fault(directory: Path, name: str, fault: Fault) -> dict:
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
