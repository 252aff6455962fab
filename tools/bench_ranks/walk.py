"""The walk: a start, steps, a save, a rank that is killed, a restart of all, and a resume on half of the ranks.

Three runs of trainer/main.py. The first is not disturbed. In the second, the last rank is killed after a save,
and all start again; its losses have to be those of the first. The third goes on from the second's last
checkpoint on half of the ranks.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tools.bench_ranks import counting
from tools.bench_ranks.cluster import Attempt, Cluster
from tools.bench_ranks.inputs import write_model
from tools.bench_ranks.standin import StandInRuntime

STEPS, SAVE_STEPS, KILLED_BEFORE, MORE_STEPS = 10, 5, 8, 2


@dataclass(frozen=True)
class Layout:
    """How the ranks divide the model."""

    processes: int
    tensor: int
    stages: int

    @classmethod
    def of(cls, processes: int) -> "Layout":
        """8 tensor parallel ranks, 2 stages and 4 data parallel ranks of 64; fewer of fewer processes."""
        tensor = 8 if processes >= 32 else 2
        return cls(processes, tensor, 2 if processes >= 4 * tensor else 1)

    @property
    def flags(self) -> list[str]:
        return f"--tensor_parallel_size {self.tensor} --pipeline_parallel_size {self.stages}".split()

    def __str__(self):
        data = self.processes // self.tensor // self.stages
        return f"{self.processes} processes, TP{self.tensor} x PP{self.stages} x DP{data}"


def walk(directory: Path, processes: int, machines: int, checkpoint_bytes: float, limit: float) -> dict:
    """Walk in a new directory; returns the figures {run: {figure: value}}. Raises RuntimeError where a run
    does not end as it has to."""
    directory.mkdir(parents=True)
    parameters = write_model(directory / "model", checkpoint_bytes)
    base_bytes = sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors"))
    whole, half = Layout.of(processes), Layout.of(processes // 2)
    flags = _flags(directory)

    def run(name, layout, plant=lambda *_: None, restarts=0, **more):
        own = [*flags, *layout.flags, "--output_dir", str(directory / name / "out")]
        own += [text for flag, value in more.items() for text in (f"--{flag}", str(value))]
        count = machines if layout is whole else max(1, machines // 2)
        attempts = Cluster(layout.processes, count, own, directory / name, plant).run(restarts, limit)
        _check(attempts, restarts)
        return attempts

    [first] = run("undisturbed", whole, max_steps=STEPS)
    killed, again = run("killed", whole, _kills(processes - 1), 1, max_steps=STEPS, resume="latest")
    saved = directory / "killed" / "out" / f"checkpoint-{SAVE_STEPS}"
    last = directory / "killed" / "out" / f"checkpoint-{STEPS}"
    [on_half] = run("half", half, max_steps=STEPS + MORE_STEPS, resume=last)
    sizes = {counting.CHECKPOINT: _bytes(saved), counting.BASE: base_bytes}
    found = {
        "start": figures(first, sizes),
        "start, rank killed": figures(killed, sizes),
        "restart": figures(again, sizes),
        "resume on half": figures(on_half, sizes),
    }
    differs = loss_difference(*(directory / name / "out" for name in ("undisturbed", "killed")))
    made = {"processes": str(whole), "on half": str(half), "machines": machines, "parameters": parameters}
    return (
        made
        | {"checkpoint_bytes": sizes["checkpoint"], "base_bytes": base_bytes, "runs": found}
        | {"largest_relative_difference_of_losses": differs}
    )


def _flags(directory: Path) -> list[str]:
    return [
        *f"--model_id {directory / 'model'} --data_cache_dir {directory / 'tokens'}".split(),
        *"--lora_r 0 --zero_1 true --parallel_layers native --max_seq_length 32".split(),
        *f"--global_batch_size 8 --per_device_train_batch_size 2 --save_steps {SAVE_STEPS}".split(),
    ]


def _kills(victim: int):
    """A plant: the rank kills itself, in the first attempt, after a save."""

    def plant(rank, machine, attempt):
        def kill(step):
            if step == KILLED_BEFORE:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == victim and attempt == 0:
            StandInRuntime.when_stepping.append(kill)

    return plant


def _check(attempts: list[Attempt], restarts: int) -> None:
    """Raise RuntimeError unless all attempts but the last were ended by a killed rank, and the last one was
    not."""
    for number, attempt in enumerate(attempts):
        if attempt.hung or attempt.succeeded != (number == restarts):
            failed = [rank for rank, (status, *_) in attempt.ended().items() if status] or [0]
            what = "did not end" if attempt.hung else "ended otherwise than it has to"
            raise RuntimeError(
                f"{attempt.logs}: it {what}; rank {failed[0]}: {attempt.printed(failed[0])[-2000:]}"
            )


def figures(attempt: Attempt, sizes: dict[str, int]) -> dict[str, float]:
    """What the ranks of an attempt have needed, to be read as <figure>: <value>. `sizes`: the bytes of a
    checkpoint and of the base model, by kind of file."""
    marks = attempt.marks()
    last = [each[-1] for each in marks.values()]

    def latest(name):
        """Seconds until every rank has come to a mark the first time."""
        at = [
            next((mark["seconds"] for mark in each if mark["mark"] == name), None) for each in marks.values()
        ]
        return max(at) if None not in at else None

    def total(counter, kind):
        return sum(each[counter].get(kind, 0) for each in last)

    steps = [mark["seconds"] for mark in marks[0] if mark["mark"].startswith("step ")]
    save = [mark["seconds"] for mark in marks[0] if mark["mark"] in ("save", "copied")]
    found = {
        "seconds until prepared": latest("prepared"),
        "seconds until met": latest("met"),
        "seconds until built": latest("built"),
        "seconds of a step": sorted(b - a for a, b in zip(steps, steps[1:], strict=False))[
            len(steps) // 2 - 1
        ],
        "seconds a save held up": save[1] - save[0] if len(save) > 1 else None,
        "seconds in all": attempt.seconds,
        "texts tokenized": sum(each["tokenized"] for each in last),
        "files open at once": max(each["most_open"] for each in last),
        "messages to the store": sum(sum(each["store"].values()) for each in last),
        "private MB of a rank": max(mark["private"] for each in marks.values() for mark in each) / 1e6,
        "GB of all": attempt.peak / 1e9,
        "bytes read by the kernel's count": sum(each["rchar"] for each in last),
        "bytes written by the kernel's count": sum(each["wchar"] for each in last),
    }
    for kind in (counting.CHECKPOINT, counting.BASE, counting.TOKENS, counting.OTHER):
        found[f"bytes read: {kind}"] = total("read", kind)
        found[f"files opened: {kind}"] = total("opened", kind)
        if kind in sizes:
            found[f"times the {kind} was read"] = total("read", kind) / sizes[kind]
    return found


def loss_difference(one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses; raises RuntimeError where they have other steps."""
    losses = [
        {
            line["step"]: line["loss"]
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        }
        for run in (one, other)
    ]
    if losses[0].keys() != losses[1].keys():
        raise RuntimeError(f"{one} has the steps {list(losses[0])}, and {other} has {list(losses[1])}")
    return max(abs(losses[0][step] / losses[1][step] - 1) for step in losses[0])


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
