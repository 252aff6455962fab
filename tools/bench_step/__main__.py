"""Throughput of the real training step, measured: time, tokens, FLOP/s, and where the time goes.

    python -m tools.bench_step [--steps 20] [--warmup 3] [--json NEW] [--compare OLD] [--profile DIR] FLAGS

FLAGS are those of trainer/main.py, whose loop runs; on a CPU, --world_size ranks in this process. After the
warmup `steps` steps run as in training. Then as many run with a wait for the device in each, which tells the
host's tracing from the device's work: added up they exceed a step of the first part where the two overlap
there. --profile records two more steps, which are in no figure, in DIR/step.trace.json.gz
(tools/bench_step/trace.py), for https://ui.perfetto.dev or chrome://tracing.

FLOPs are those of the products of forward and backward (tools/graphs/flops.py), of all micro-batches and
ranks. MFU (model FLOPs utilisation, https://arxiv.org/abs/2204.02311) leaves out what is only recomputed for
--gradient_checkpointing, and what the stages of a pipeline compute while they are idle; HFU counts it. The
peak is that of a product of 2048 x 2048 matrices, measured before the run on the same device: on a CPU all
ranks share it.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

GEMM, ROUNDS, RECORDED = 2048, 6, 2


class Clock:
    """Rank 0's times of each optimizer step: the moments before and after every mark_step.

    The device is waited for in the steps `waits`; those from waits.stop on are recorded by `trace`, if any.
    """

    def __init__(self, runtime, micro_graphs: int, waits: range, trace=None):
        self.traced, self.worked, self.ended = [], [], []
        self._graphs, self._waits, self._recorder = micro_graphs, waits, trace
        self._mark_step, self._calls = runtime.mark_step, -1  # the first one ends the building of the model
        self._since, self._trace, self._work = 0.0, 0.0, 0.0
        runtime.mark_step = self.mark_step

    def mark_step(self, *place) -> None:
        import torch_xla.core.xla_model as xla_model

        begun = time.perf_counter()
        self._trace += begun - self._since
        if self._recorder:
            self._recorder.phase("mark_step")
        self._mark_step(*place)
        if len(self.ended) in self._waits:
            xla_model.wait_device_ops()
        self._since = time.perf_counter()
        self._work += self._since - begun
        self._calls += 1
        if self._calls == 0:
            self._trace = self._work = 0.0
        elif self._calls % self._graphs == 0:
            self.traced.append(self._trace)
            self.worked.append(self._work)
            self.ended.append(self._since)
            self._trace = self._work = 0.0
            if self._recorder and len(self.ended) == self._waits.stop:
                self._recorder.start()
            elif self._recorder and len(self.ended) == self._waits.stop + RECORDED:
                xla_model.wait_device_ops()
                self._recorder.stop()
        if self._recorder:
            self._recorder.phase("host tracing")


def gemm_peak(dtype: str) -> float:
    """FLOP/s of the best of some products [2048, 2048] x [2048, 2048] on this process's first device."""
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
    """Run the loop, and return what was measured, times in seconds. `trace`: a StepTrace, which records steps
    behind them."""
    from model.llama import Llama
    from model.lora import add_lora
    from parallel.mesh import Mesh
    from parallel.pipeline import Pipeline
    from parallel.runtime import launch
    from tools.graphs.flops import micro_batch_flops
    from trainer.job import prepare
    from trainer.loop import run

    mesh = Mesh.create(0, world_size, config.tensor_parallel_size, config.pipeline_parallel_size)
    config = config.for_ranks(mesh.dp.size())
    accumulation, seen = config.gradient_accumulation_steps, {}  # `seen`: by rank 0
    with tempfile.TemporaryDirectory() as output:
        total = warmup + 2 * steps + (RECORDED if trace else 0)
        config = replace(
            config, output_dir=output, max_steps=total, save_steps=total + 1, do_eval=False, logging_steps=1
        )
        job = prepare(config, world_size)

        def program(runtime):
            if runtime.rank == 0:
                seen["peak"] = gemm_peak("bfloat16" if config.bf16 else "float32")
                seen["compiled"] = runtime.compilations()
                seen["clock"] = Clock(
                    runtime, config.mark_steps, range(warmup + steps, warmup + 2 * steps), trace
                )
            runtime.barrier()
            run(runtime, job)

        launch(program, world_size)
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    clock, peak = seen["clock"], seen["peak"]
    free, waited = slice(warmup, warmup + steps), slice(warmup + steps, warmup + 2 * steps)
    seconds = np.diff(clock.ended)[warmup - 1 : warmup + steps - 1]
    stage, model = (
        Llama(job.model_config, mesh.tp, sequence_parallel=config.divides_sequence, pipeline=each)
        for each in (Pipeline(mesh.pp, mesh.model), Pipeline())
    )
    if job.lora:
        add_lora(stage, job.lora)
        add_lora(model, job.lora)
    micro_batches = accumulation * world_size / np.median(seconds)  # a second, of all ranks
    plain = replace(config, gradient_checkpointing="none", pipeline_parallel_size=1, num_microbatches=1)
    mfu = (
        micro_batch_flops(model, plain) / mesh.pp.size() * micro_batches / peak
    )  # idle ticks are not counted
    hfu = micro_batch_flops(stage, config) * micro_batches / peak
    tokens = config.per_device_train_batch_size * config.max_seq_length / mesh.model.size()
    return {
        "step_seconds": float(np.median(seconds)),
        "step_seconds_least": float(seconds.min()),
        "step_seconds_most": float(seconds.max()),
        "target_tokens_per_second": float(
            np.median([line["target_tokens"] for line in lines[free]]) / np.median(seconds)
        ),
        "tokens_per_second": float(
            np.median([line["tokens_per_second"] * line["step_seconds"] for line in lines[free]])
            / np.median(seconds)
        ),
        "padded_tokens_per_second": float(tokens * micro_batches),
        "flops_per_second": float(hfu * peak),
        "gemm_flops_per_second": float(peak),
        "mfu": float(mfu),
        "hfu": float(hfu),
        "data_wait_seconds": float(np.median([line["data_wait_seconds"] for line in lines[free]])),
        "host_trace_seconds": float(np.median(clock.traced[waited])),
        "device_seconds": float(np.median(clock.worked[waited])),
        "compilations": lines[-1]["compilations"] - seen["compiled"],
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(found: dict, old: dict | None) -> None:
    """Print a line a figure, and beside it its ratio to an older measurement's."""
    for name, value in found.items():
        shown = f"{value:.4g}" if value < 1e4 else f"{value:.3e}"
        ratio = f"   {value / old[name]:6.3f} of the old" if old and old.get(name) else ""
        print(f"{name:<26} {shown:>10}{ratio}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_step",
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog="All other flags are those of trainer/main.py.",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the two parts; default 20")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; default 3")
    parser.add_argument("--json", type=Path, help="where the figures go, for a later --compare")
    parser.add_argument("--compare", type=Path, help="figures of another run, of the same flags and machine")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="record two more steps as a Chrome trace in DIR"
    )
    chosen, flags = parser.parse_known_args(arguments)
    from model.weights.hub import read_json
    from parallel.runtime import prepare_environment
    from trainer.config import parse

    config = parse(flags)
    try:
        if min(chosen.steps, chosen.warmup) < 1:
            raise ValueError("--steps and --warmup: at least 1 was expected")
        old = read_json(chosen.compare) if chosen.compare else None
        world_size = config.world_size or 1
        prepare_environment(world_size, config.stochastic_rounding)
        trace = None
        if chosen.profile:
            from tools.bench_step.trace import StepTrace

            trace = StepTrace(chosen.profile)
        found = measure(config, world_size, chosen.steps, chosen.warmup, trace)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(found, old)
    if trace:
        print(f"{trace.file}: open it in https://ui.perfetto.dev or chrome://tracing")
    if chosen.json:
        chosen.json.write_text(json.dumps(found | {"flags": flags}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from parallel.runtime import use_huge_pages

    use_huge_pages()
    sys.exit(main())
