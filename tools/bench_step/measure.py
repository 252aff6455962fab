"""Runs the training loop for some steps, and measures time, tokens and FLOP/s of a warm step."""

import json
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from parallel.graph import backend
from parallel.runtime import GraphListener, on_gpu

GEMM, GPU_GEMM = 2048, 8192  # rows and columns of the matrices whose product is the peak
ROUNDS = 6
RECORDED = 2  # steps in a Chrome trace
COMPILING = 1  # steps in which torch_xla compiles again what is not replayed any more


@dataclass(frozen=True)
class Parts:
    """The numbers of the steps of a run, from 0. Before `free` it warms up.

    Steps `free` run as in training, and so do `traced_free`, in which no graph is replayed. In the steps
    `waited`, and in `traced`, in which no graph is replayed either, each mark_step waits for the device. A
    Chrome trace shows `recorded`.
    """

    free: range
    waited: range
    recorded: range
    traced: range
    traced_free: range

    @staticmethod
    def create(warmup: int, steps: int, recorded: int, replays: bool) -> "Parts":
        """Parts of `steps` steps each. Where nothing is replayed, the first two are those that are traced."""
        ends = np.cumsum([warmup, steps, steps, recorded]).tolist()
        free, waited, shown = (range(*pair) for pair in pairwise(ends))
        if not replays:
            return Parts(free, waited, shown, waited, free)
        first = ends[-1] + COMPILING
        middle, last = first + steps, first + 2 * steps
        return Parts(free, waited, shown, range(first, middle), range(middle, last))

    @property
    def total(self) -> int:
        """The number of steps of the run."""
        return max(self.traced_free.stop, self.recorded.stop)


class Clock(GraphListener):
    """Rank 0's times of each optimizer step, taken at every mark_step.

    `trace`, if any, records the steps `parts.recorded`. The lists have a value for each step: the seconds
    until mark_step returned in `host_seconds`, those of them that had passed before XLA was called in
    `python_seconds`, those for which mark_step then waited for the device in `device_seconds`, the moments at
    which it returned in `ended`, and whether no graph was traced in `replayed`.
    """

    def __init__(self, step_ends: str, parts: Parts, trace=None):
        """step_ends: the name of a step's last graph."""
        self.host_seconds, self.python_seconds, self.device_seconds = [], [], []
        self.ended, self.replayed = [], []
        self._step_ends, self._parts, self._recorder = step_ends, parts, trace
        self._begun = self._host = self._python = self._device = 0.0
        self._traces = 0

    def tracing(self, name):
        self._begun = time.perf_counter()

    def traced(self, name):
        self._python += time.perf_counter() - self._begun
        if self._recorder:
            self._recorder.phase("mark_step")

    def started(self, name):
        import torch_xla.core.xla_model as xla_model

        started, step = time.perf_counter(), len(self.ended)
        if step in self._parts.waited or step in self._parts.traced:
            xla_model.wait_device_ops()
        ended = time.perf_counter()
        self._host += started - self._begun
        self._device += ended - started
        if name == self._step_ends:
            self.host_seconds.append(self._host)
            self.python_seconds.append(self._python)
            self.device_seconds.append(self._device)
            self.ended.append(ended)
            self.replayed.append(traces() == self._traces)
            self._record(step + 1)
        if name in (self._step_ends, "build"):
            self._host = self._python = self._device = 0.0
            self._traces = traces()
        if self._recorder:
            self._recorder.phase("host tracing")

    def _record(self, step: int) -> None:
        """Begin or end the Chrome trace, where `step` is the next one."""
        import torch_xla.core.xla_model as xla_model

        if self._recorder and step == self._parts.recorded.start:
            self._recorder.start()
        elif self._recorder and step == self._parts.recorded.stop:
            xla_model.wait_device_ops()
            self._recorder.stop()


class _EndsReplay(GraphListener):
    """Traces every graph of a rank from the step `COMPILING` before the steps `parts.traced` on."""

    def __init__(self, runtime, step_ends: str, parts: Parts):
        self._runtime, self._step_ends, self._left = runtime, step_ends, parts.traced.start - COMPILING

    def started(self, name):
        self._left -= name == self._step_ends
        if self._left == 0:
            self._runtime.replay_graphs(False)


def traces() -> int:
    """How many graphs this process has traced so far: torch_xla does not count what it starts by its hash."""
    return backend.count("TensorsGraphSize")


def gemm_peak(dtype: str) -> float:
    """FLOP/s of the fastest of ROUNDS products of square matrices (GEMM, on a GPU GPU_GEMM) on this process's
    first device."""
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xla_model

    device, size = torch_xla.device(), GPU_GEMM if on_gpu() else GEMM
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)).to(device) for _ in range(2))
    best = np.inf
    for _ in range(ROUNDS):
        torch_xla.sync()
        xla_model.wait_device_ops()
        begun = time.perf_counter()
        product = left @ right.t()
        torch_xla.sync()
        xla_model.wait_device_ops()
        best = min(best, time.perf_counter() - begun)
        del product
    return 2 * size**3 / best


def measure(config, world_size: int, steps: int, warmup: int, trace=None, begun: float | None = None) -> dict:
    """Run the loop, and return the figures of a step: times in seconds, medians over `steps` steps, or those
    of them whose predecessor was traced, or replayed, too.

    Parts says which steps run; a StepTrace `trace` records RECORDED of them. `begun`: the time.perf_counter()
    from which the first step's seconds count; default: now. Raises ValueError for a job that cannot start.
    """
    from parallel.mesh import Mesh
    from trainer.job import prepare

    begun = begun or time.perf_counter()
    mesh = Mesh.create(0, world_size, config.tensor_parallel_size, config.pipeline_parallel_size)
    parts = Parts.create(warmup, steps, RECORDED if trace else 0, config.replay)
    with tempfile.TemporaryDirectory() as output:
        config = replace(
            config.for_ranks(mesh.dp.size()),
            output_dir=output,
            max_steps=parts.total,
            save_steps=parts.total + 1,
            do_eval=False,
            logging_steps=1,
        )
        job = prepare(config, world_size)
        found = _run(job, world_size, parts, trace)
        clock, peak, compiled = found.clock, found.peak, found.compiled
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    # Not between the moments at which mark_step returned: a traced step waits in it, a replayed one after it.
    # So the seconds of a step that is replayed after a traced one, or the reverse, lack or have a wait more.
    seconds = np.array([line["step_seconds"] for line in lines])
    alike = [step for step in parts.free if clock.replayed[step] == clock.replayed[step - 1]]
    in_free = seconds[alike or list(parts.free)]
    free_lines = lines[parts.free.start : parts.free.stop]
    return {
        "step_seconds": float(np.median(in_free)),
        "step_seconds_least": float(in_free.min()),
        "step_seconds_most": float(in_free.max()),
        **_replayed("step_replay_seconds", seconds, clock, alike),
        "step_trace_seconds": float(np.median(seconds[parts.traced_free])),
        "first_step_seconds": clock.ended[0] - begun - found.peak_seconds,
        **_rates(job, mesh, float(np.median(in_free)), free_lines, peak),
        "data_wait_seconds": float(np.median([line["data_wait_seconds"] for line in free_lines])),
        "host_trace_seconds": float(np.median(np.array(clock.host_seconds)[parts.traced])),
        "python_trace_seconds": float(np.median(np.array(clock.python_seconds)[parts.traced])),
        **_replayed("host_replay_seconds", clock.host_seconds, clock, parts.waited),
        **_replayed("python_replay_seconds", clock.python_seconds, clock, parts.waited),
        "device_seconds": float(np.median(np.array(clock.device_seconds)[parts.waited])),
        "compilations": lines[parts.waited[-1] - 1]["compilations"] - compiled,
        "peak_memory_bytes": peak_memory(),
        **({"peak_device_memory_bytes": found.memory} if found.memory else {}),
    }


def _replayed(name: str, seconds, clock: Clock, steps: range) -> dict[str, float]:
    """{name: the median of the seconds of those of the steps that were replayed}; empty where none was."""
    found = [seconds[step] for step in steps if clock.replayed[step]]
    return {name: float(np.median(found))} if found else {}


@dataclass
class _Found:
    """What rank 0 found: its clock, FLOP/s of gemm_peak and the seconds that measuring it took, graphs that
    were compiled before the loop, and the most bytes of the device's memory in use, None where it does not
    tell."""

    clock: Clock
    peak: float
    peak_seconds: float
    compiled: int
    memory: int | None = None


def _run(job, world_size: int, parts: Parts, trace) -> _Found:
    """Run the loop."""
    from parallel.runtime import launch
    from trainer.loop import run

    found, step_ends = [], list(job.config.graphs)[-1]

    def program(runtime):
        if runtime.rank == 0:
            begun = time.perf_counter()
            peak = gemm_peak("bfloat16" if job.config.bf16 else "float32")
            seconds = time.perf_counter() - begun
            clock = Clock(step_ends, parts, trace)
            runtime.listeners.append(clock)
            found.append(_Found(clock, peak, seconds, runtime.compilations()))
        if job.config.replay:
            runtime.listeners.append(_EndsReplay(runtime, step_ends, parts))
        runtime.barrier()
        run(runtime, job)
        if runtime.rank == 0:
            memory = runtime.device_memory()
            found[0].memory = memory and memory[1]

    launch(program, world_size)
    return found[0]


def _rates(job, mesh, seconds: float, lines: list[dict], peak: float) -> dict[str, float]:
    """Tokens and FLOPs a second of all ranks, and their shares of the peak.

    `seconds`: of a step. `lines`: of metrics.jsonl, for the steps that were measured. `peak`: FLOP/s of all
    ranks together.
    """
    from trainer.objective import objective_of

    config = job.config
    micro_batches = config.gradient_accumulation_steps * mesh.world_size / seconds  # a second, of all ranks
    model_flops, hardware_flops = _micro_batch_flops(job, mesh)
    hfu = hardware_flops * micro_batches / peak
    padded_tokens = config.per_device_train_batch_size * config.max_seq_length / mesh.model.size()
    unit = objective_of(config).UNIT  # target_tokens, say
    units = np.median([line[unit] for line in lines])
    tokens = np.median([line["tokens_per_second"] * line["step_seconds"] for line in lines])
    return {
        f"{unit}_per_second": float(units / seconds),
        "tokens_per_second": float(tokens / seconds),
        "padded_tokens_per_second": float(padded_tokens * micro_batches),
        "flops_per_second": float(hfu * peak),
        "gemm_flops_per_second": float(peak),
        "mfu": float(model_flops * micro_batches / peak),
        "hfu": float(hfu),
    }


def _micro_batch_flops(job, mesh) -> tuple[float, float]:
    """FLOPs of an accumulation step on one rank: (that the model needs, that the rank executes).

    The second ones include recomputation and idle ticks.
    """
    from trainer.build import build_model
    from trainer.reporting.flops import micro_batch_flops, model_flops

    config = job.config
    stage = build_model(config, job.model_config, mesh, job.lora)
    return model_flops(config, job.model_config, job.lora, mesh), micro_batch_flops(stage, config)


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
