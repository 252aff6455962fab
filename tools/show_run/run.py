"""Reads what a run has written so far: one that ended, that is still going, or that was cut off."""

import fcntl
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from trainer.reporting.files import EVALUATIONS, METRICS, SAMPLES, STARTS

WARMUP = 2  # steps after a start in which graphs are expected to be compiled


@dataclass(frozen=True)
class Run:
    """The lines of a run's files, by step; `unread` counts those that are no lines of a run."""

    name: str
    path: Path
    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    starts: list[dict]
    goes_on: bool
    unread: int

    @property
    def flags(self) -> dict:
        """The flags of the last start."""
        return self.starts[-1]["flags"] if self.starts else {}

    @property
    def restarts(self) -> list[int]:
        """The steps after which the run was started again."""
        return [start["step"] for start in self.starts[1:]]

    @property
    def recompilations(self) -> list[int]:
        """The logged steps up to which graphs were compiled, later than at a start."""
        beginnings = [start["step"] for start in self.starts] or [0]
        found, before = [], math.inf
        for line in self.metrics:
            compilations = line.get("compilations") or 0
            # A new process counts from 0.
            if compilations > before and all(not 0 < line["step"] - step <= WARMUP for step in beginnings):
                found.append(line["step"])
            before = compilations
        return found

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        last = max((line["step"] for line in self.metrics + self.evaluations), default=0)
        total = self.starts[-1]["total_steps"] if self.starts else None
        of = f" of {total}" if total else ""
        if self.goes_on:
            return f"running, after step {last}{of}"
        if not self.metrics and self.evaluations:
            return "evaluation only" if self.flags.get("do_train") is False else f"stopped before step 1{of}"
        return f"ended after step {last}{of}"


def read_run(directory: Path) -> Run:
    """The run of an output directory; raises ValueError where there is none."""
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist: the output directory of a run was expected")
    read = {name: _read(directory / name) for name in (METRICS, EVALUATIONS, SAMPLES, STARTS)}
    if not any(lines for name, (lines, _) in read.items()):
        raise ValueError(f"{directory} has no {METRICS}, {EVALUATIONS} or {STARTS} of a run with a line yet")
    starts = [line for line in read[STARTS][0] if isinstance(line.get("flags"), dict)]
    name = starts[-1]["flags"].get("run_name") if starts else None
    return Run(
        name=name or directory.resolve().name,
        path=directory,
        metrics=_by_step(read[METRICS][0]),
        evaluations=_by_step(read[EVALUATIONS][0]),
        samples=read[SAMPLES][0],
        starts=starts,
        goes_on=_is_locked(directory),
        unread=sum(unread for _, unread in read.values()),
    )


def _read(path: Path) -> tuple[list[dict], int]:
    """(the objects with a step, one a line; the number of other lines, as one that was cut off)."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records, len(lines) - len(records)


def _by_step(records: list[dict]) -> list[dict]:
    """In the order of their steps; the last of those with one step."""
    return [record for _, record in sorted({record["step"]: record for record in records}.items())]


def _is_locked(directory: Path) -> bool:
    """Whether a run holds the lock of the directory (trainer.job.lock)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
