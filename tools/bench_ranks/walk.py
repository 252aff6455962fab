"""The walk: a start, steps, a save, a rank that is killed, a restart, and a resume on half of the ranks.

Three runs of trainer/main.py. The first is not disturbed. In the second, the last rank is killed after a
save, and all start again; its losses have to be those of the first. The third goes on from the second's last
checkpoint on half of the ranks.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tools.bench_ranks import counting
from tools.bench_ranks.cluster import Attempt, Cluster
from tools.bench_ranks.figures import figures
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

    @classmethod
    def check(cls, processes: int, machines: int) -> None:
        """Raise ValueError unless so many processes, and half of them, can walk."""
        if processes not in (4, 8, 16, 32, 64) or machines < 1 or processes % machines:
            raise ValueError(
                f"--processes {processes} --machines {machines}: 4, 8, 16, 32 or 64 processes were expected, "
                "and as many on each machine"
            )

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
        check(attempts, restarts)
        return attempts

    [first] = run("undisturbed", whole, max_steps=STEPS)
    killed, again = run("killed", whole, _kills(processes - 1), 1, max_steps=STEPS, resume="latest")
    runs = directory / "killed" / "out"
    [on_half] = run("half", half, max_steps=STEPS + MORE_STEPS, resume=runs / f"checkpoint-{STEPS}")
    sizes = {counting.CHECKPOINT: _bytes(runs / f"checkpoint-{SAVE_STEPS}"), counting.BASE: base_bytes}
    attempts = {"start": first, "rank killed": killed, "restart": again, "resume on half": on_half}
    return {
        "ranks": processes,
        "layout": f"{whole}, on {machines} pretended machines; half of them: {half}",
        "parameters": parameters,
        "checkpoint_bytes": sizes[counting.CHECKPOINT],
        "base_bytes": base_bytes,
        "loss_difference": loss_difference(directory / "undisturbed" / "out", runs),
        "runs": {name: figures(attempt, sizes) for name, attempt in attempts.items()},
    }


def _flags(directory: Path) -> list[str]:
    return [
        *("--model_id", str(directory / "model"), "--data_cache_dir", str(directory / "tokens")),
        *("--lora_r", "0", "--zero_1", "true", "--parallel_layers", "native", "--max_seq_length", "32"),
        *("--global_batch_size", "8", "--per_device_train_batch_size", "2"),
        *("--save_steps", str(SAVE_STEPS)),
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


def check(attempts: list[Attempt], restarts: int) -> None:
    """Raise RuntimeError unless all attempts but the last were ended by a killed rank, and the last one was
    not."""
    for number, attempt in enumerate(attempts):
        if attempt.hung or attempt.succeeded != (number == restarts):
            failed = [rank for rank, (status, *_) in attempt.ended().items() if status] or [0]
            what = "did not end" if attempt.hung else "ended otherwise than it has to"
            raise RuntimeError(
                f"{attempt.logs}: it {what}; rank {failed[0]}: {attempt.printed(failed[0])[-2000:]}"
            )


def loss_difference(one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses; raises RuntimeError unless they have the same
    steps."""
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
