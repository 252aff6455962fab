"""The record of a run: the values of each step, read one step late, for files, the log and curves."""

import math
import os
import time
from pathlib import Path

import torch

from data.loader import Loader
from parallel.mesh import Mesh
from parallel.runtime import GraphListener, Runtime
from parallel.runtime.peaks import device_and_peak
from trainer.evaluation import Evaluation
from trainer.job import Job
from trainer.objective import objective_of
from trainer.reporting.console import Progress, say
from trainer.reporting.files import EVALUATIONS, METRICS, SAMPLES, STARTS, RunFiles
from trainer.reporting.flops import model_flops
from trainer.reporting.start import start_record
from trainer.reporting.writers import Curves

MOST_NATS = 700.0  # exp() of a larger loss overflows a float


class HostTime(GraphListener):
    """The seconds that a rank's host spends in mark_step.

    In them it traces or replays the graph, compiles it if it is new, and starts it. They include what
    mark_step waits for: where ranks are threads of one process, the other ranks; the device, where torch_xla
    waits for the graph before, and while a trace is recorded for replay. On XLA:CPU the host and the device
    also share the cores.
    """

    def __init__(self):
        self._seconds = self._begun = 0.0

    def tracing(self, name):
        self._begun = time.perf_counter()

    def started(self, name):
        self._seconds += time.perf_counter() - self._begun

    def take(self) -> float:
        """The seconds since the last call of this method, or since the beginning."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Metrics:
    """Rank 0's record of a run; on other ranks, and where no graph is executed, every method does nothing.

    `OUT/metrics.jsonl` has a line for each logged step, `OUT/eval.jsonl` one for each evaluation,
    `OUT/samples.jsonl` one for each answer that was sampled at an evaluation, and `OUT/starts.jsonl` one for
    each start. Where a line cannot be written, the run saves its state and ends, and `close` raises the
    error. A step's values are read after the next mark_step, so the host never waits for the step that it has
    just started. docs/metrics.md derives each number of a line.

    The seconds of a step are those between the previous mark_step and its own: tracing, compilation of a new
    graph, and the wait for the previous step. Its host seconds, a part of them, are those inside of mark_step
    (HostTime). Both leave out evaluations, samples and checkpoints. The first step's include the graph
    "build", unless an evaluation comes before.
    """

    def __init__(self, runtime: Runtime, job: Job, first_step: int, loader: Loader):
        self._runtime, self._logging_steps = runtime, job.config.logging_steps
        self._active = runtime.rank == 0 and runtime.executes
        self._epochs, self._objective = loader.epochs, objective_of(job.config)
        self._held: tuple[int, float, float, float, float, float, torch.Tensor] | None = None
        if runtime.rank == 0:
            print(job.summary, flush=True)
        if self._active:
            self._files = RunFiles(Path(job.config.output_dir), job.stop_request.make)
            logged, evaluated = self._files.continue_from(first_step, bool(job.eval_rows))
            self._drawn = first_step if evaluated else None  # the evaluation that the curves have
            device, peak = device_and_peak()
            peak = peak and (peak.bf16 if job.config.bf16 else peak.fp32)
            self._seconds_at_peak = seconds_at_peak(job, runtime.world_size, peak) if peak else None
            self._files.append(STARTS, start_record(runtime, job, first_step, device, peak))
            self._curves = Curves(job, first_step, logged)
            self._progress = Progress(first_step, job.total_steps)
            self._host = HostTime()
            runtime.listeners.append(self._host)
            self._last = time.perf_counter()

    def hold(
        self, step: int, learning_rate: float, waited: float, stalled: float, report: torch.Tensor
    ) -> None:
        """Keep the report of the 1-based `step`, and write that of the step before it.

        waited: seconds for which the step waited for data. stalled: seconds for which a save before it held
        training up. report: what trainer.loop.update returned, on the device, part of the last mark_step.
        """
        if self._active:
            self.flush()
            now = time.perf_counter()
            seconds, self._last = now - self._last, now
            self._held = (step, seconds, self._host.take(), learning_rate, waited, stalled, report)

    def flush(self) -> None:
        """Write the values that are held; the host waits here until the device has computed them."""
        if not self._active or self._held is None:
            return
        (step, seconds, host, learning_rate, waited, stalled, report), self._held = self._held, None
        grad_norm, units, tokens, *means = self._runtime.read(report)
        used, most_used = self._runtime.device_memory() or (None, None)
        record = {
            "step": step,
            "epoch": self._epochs(step),
            **dict(zip(self._objective.FIGURES, means, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            self._objective.UNIT: int(units),
            "tokens_per_second": tokens / seconds,
            "mfu": self._seconds_at_peak and self._seconds_at_peak / seconds,
            "step_seconds": seconds,
            "host_seconds": host,
            "data_wait_seconds": waited,
            "save_stall_seconds": stalled,
            "device_memory_bytes": used,
            "device_memory_peak_bytes": most_used,
            "host_memory_bytes": resident_memory(),
            "compilations": self._runtime.compilations(),
        }
        logged = step % self._logging_steps == 0
        self._progress.step(record, logged)
        if logged:
            self._files.append(METRICS, record)
            self._curves.step(record)

    def evaluation(self, step: int, found: Evaluation, samples: list[dict[str, str]]) -> None:
        """Write an evaluation after `step` steps, with the perplexity where the loss is per target token, and
        samples, the results of Samples.generate."""
        if self._active:
            unit, more = self._objective.UNIT, {}
            if unit == "target_tokens":
                more["perplexity"] = math.exp(min(found.loss, MOST_NATS))
            shown = more | {name: value for name, value in found.figures.items() if "accuracies" in name}
            say(
                f"step {step}: evaluation loss {found.loss:.4f}, "
                + "".join(f"{name} {value:.4g}, " for name, value in shown.items())
                + f"over {found.units} {unit.replace('_', ' ')}"
            )
            record = {
                "step": step,
                "epoch": self._epochs(step),
                **{f"eval_{name}": value for name, value in found.figures.items()},
                **more,
                unit: found.units,
                "compilations": self._runtime.compilations(),
            }
            self._files.append(EVALUATIONS, record)
            for sample in samples:
                self._files.append(SAMPLES, {"step": step} | sample)
            for sample in samples[:1]:
                say(f"step {step}: asked {sample['prompt']!r}, answered {sample['answer']!r}")
            if step != self._drawn:
                self._curves.evaluation(record, samples)
            self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (an evaluation, a checkpoint) from the next step's seconds."""
        if self._active:
            self._host.take()
            self._last = time.perf_counter()

    def stopped(self, step: int) -> None:
        """Print on every machine that the run ends early, after `step` steps: launch scripts look for it."""
        if self._active:
            say(f"stopped after step {step} of {self._progress.total_steps}: --resume latest goes on")
        elif self._runtime.executes and os.environ.get("LOCAL_RANK") == "0":
            say(f"stopped after step {step}")

    def close(self) -> None:
        """Write the values that are held, and end progress bar and curves. Raises the OSError of a file that
        could not be written."""
        self.flush()
        if self._active:
            self._progress.close()
            self._curves.close()
            if self._files.error:
                raise self._files.error


def seconds_at_peak(job: Job, world_size: int, peak: float) -> float:
    """The seconds that a step would take if every device computed what the model needs at `peak` FLOP/s."""
    config = job.config
    mesh = Mesh.create(0, world_size, config.tensor_parallel_size, config.pipeline_parallel_size)
    needed = model_flops(config, job.model_config, job.lora, mesh)
    return config.gradient_accumulation_steps * needed / peak


def resident_memory() -> int:
    """The bytes of this process that are in the host's memory (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
