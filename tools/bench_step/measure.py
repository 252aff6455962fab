"""Runs the training loop for some steps, and measures time, tokens and FLOP/s of a warm step."""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from parallel.mesh import ALONE
from parallel.runtime import GraphListener

GEMM = 2048  # rows and columns of the matrices whose product is the peak
ROUNDS = 6
RECORDED = 2  # steps in a Chrome trace


class Clock(GraphListener):
    """Rank 0's times of each optimizer step, taken at every mark_step.

    In the steps `waits`, each mark_step waits for the device. `trace`, if any, records steps from waits.stop
    on. The lists have a value for each step: the seconds of tracing in `trace_seconds`, those of mark_step in
    `device_seconds`, and the moments at which steps ended in `ended`.
    """

    def __init__(self, step_ends: str, waits: range, trace=None):
        """step_ends: the name of a step's last graph."""
        self.trace_seconds, self.device_seconds, self.ended = [], [], []
        self._step_ends, self._waits, self._recorder = step_ends, waits, trace
        self._since = self._begun = self._trace = self._work = 0.0

    def traced(self, name):
        self._begun = time.perf_counter()
        self._trace += self._begun - self._since
        if self._recorder:
            self._recorder.phase("mark_step")

    def started(self, name):
        import torch_xla.core.xla_model as xla_model

        if len(self.ended) in self._waits:
            xla_model.wait_device_ops()
        self._since = time.perf_counter()
        self._work += self._since - self._begun
        if name == self._step_ends:
            self.trace_seconds.append(self._trace)
            self.device_seconds.append(self._work)
            self.ended.append(self._since)
            if self._recorder and len(self.ended) == self._waits.stop:
                self._recorder.start()
            elif self._recorder and len(self.ended) == self._waits.stop + RECORDED:
                xla_model.wait_device_ops()
                self._recorder.stop()
        if name in (self._step_ends, "build"):
            self._trace = self._work = 0.0
        if self._recorder:
            self._recorder.phase("host tracing")


def gemm_peak(dtype: str) -> float:
    """FLOP/s of the fastest of ROUNDS products of [GEMM, GEMM] matrices on this process's first device."""
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xla_model

    device = torch_xla.device()
    left, right = (torch.randn(GEMM, GEMM).to(getattr(torch, dtype)).to(device) for _ in range(2))
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
    return 2 * GEMM**3 / best


def measure(config, world_size: int, steps: int, warmup: int, trace=None) -> dict:
    """Run the loop, and return the figures of a step: times in seconds, medians over `steps` steps.

    After `warmup` steps, `steps` steps run as in training, and as many wait for the device. A StepTrace
    `trace` then records RECORDED more. Raises ValueError for a job that cannot start.
    """
    from parallel.mesh import Mesh
    from trainer.job import prepare

    mesh = Mesh.create(0, world_size, config.tensor_parallel_size, config.pipeline_parallel_size)
    with tempfile.TemporaryDirectory() as output:
        total = warmup + 2 * steps + (RECORDED if trace else 0)
        config = replace(
            config.for_ranks(mesh.dp.size()),
            output_dir=output,
            max_steps=total,
            save_steps=total + 1,
            do_eval=False,
            logging_steps=1,
        )
        job = prepare(config, world_size)
        free = slice(warmup, warmup + steps)
        waited = slice(warmup + steps, warmup + 2 * steps)
        clock, peak, compiled = _run(job, world_size, range(waited.start, waited.stop), trace)
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    seconds = np.diff(clock.ended)[warmup - 1 : warmup + steps - 1]
    return {
        "step_seconds": float(np.median(seconds)),
        "step_seconds_least": float(seconds.min()),
        "step_seconds_most": float(seconds.max()),
        **_rates(job, mesh, float(np.median(seconds)), lines[free], peak),
        "data_wait_seconds": float(np.median([line["data_wait_seconds"] for line in lines[free]])),
        "host_trace_seconds": float(np.median(clock.trace_seconds[waited])),
        "device_seconds": float(np.median(clock.device_seconds[waited])),
        "compilations": lines[-1]["compilations"] - compiled,
        "peak_memory_bytes": peak_memory(),
    }


def _run(job, world_size: int, waits: range, trace) -> tuple[Clock, float, int]:
    """Run the loop; returns (rank 0's Clock, FLOP/s of gemm_peak, graphs compiled before the loop)."""
    from parallel.runtime import launch
    from trainer.loop import run

    found = []

    def program(runtime):
        if runtime.rank == 0:
            peak = gemm_peak("bfloat16" if job.config.bf16 else "float32")
            compiled = runtime.compilations()
            clock = Clock(list(job.config.graphs)[-1], waits, trace)
            runtime.listeners.append(clock)
            found.extend((clock, peak, compiled))
        runtime.barrier()
        run(runtime, job)

    launch(program, world_size)
    return tuple(found)


def _rates(job, mesh, seconds: float, lines: list[dict], peak: float) -> dict[str, float]:
    """Tokens and FLOPs a second of all ranks, and their shares of the peak.

    `seconds`: of a step. `lines`: of metrics.jsonl, for the steps that were measured. `peak`: FLOP/s of all
    ranks together.
    """
    config = job.config
    micro_batches = config.gradient_accumulation_steps * mesh.world_size / seconds  # a second, of all ranks
    model_flops, hardware_flops = _micro_batch_flops(job, mesh)
    hfu = hardware_flops * micro_batches / peak
    padded_tokens = config.per_device_train_batch_size * config.max_seq_length / mesh.model.size()
    target_tokens = np.median([line["target_tokens"] for line in lines])
    tokens = np.median([line["tokens_per_second"] * line["step_seconds"] for line in lines])
    return {
        "target_tokens_per_second": float(target_tokens / seconds),
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
    from tools.graphs.flops import micro_batch_flops
    from trainer.build import build_model

    config = job.config
    plain = replace(config, gradient_checkpointing="none", pipeline_parallel_size=1, num_microbatches=1)
    one_stage = replace(mesh, pp=ALONE, model=mesh.tp)
    stage = build_model(config, job.model_config, mesh, job.lora)
    whole = build_model(plain, job.model_config, one_stage, job.lora)
    return micro_batch_flops(whole, plain) / mesh.pp.size(), micro_batch_flops(stage, config)


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
