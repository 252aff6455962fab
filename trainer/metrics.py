"""The output of a run: JSON lines of metrics, which are read one step late, and a progress bar."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import Loader
from model.weights.hub import naming
from parallel.runtime import GraphListener, Runtime
from trainer.evaluation import Evaluation
from trainer.job import Job
from trainer.objective import objective_of

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

    `OUT/metrics.jsonl` has a line for each logged step, `OUT/eval.jsonl` one for each evaluation, and
    `OUT/samples.jsonl` one for each answer that was sampled at an evaluation. Where a line cannot be written,
    the run saves its state and ends, and `close` raises the error. A step's values are read after
    the next mark_step, so the host never waits for the step that it has just started. The seconds of a step
    are those between the previous mark_step and its own: tracing, compilation of a new graph, and the wait
    for the previous step. Its host seconds, a part of them, are those inside of mark_step (HostTime). Both
    leave out evaluations, samples and checkpoints. The first step's include the graph "build", unless an
    evaluation comes before.
    """

    def __init__(self, runtime: Runtime, job: Job, first_step: int, loader: Loader):
        self._runtime, self._output = runtime, Path(job.config.output_dir)
        self._active = runtime.rank == 0 and runtime.executes
        self._failed, self._stop = None, job.terminated  # as SIGTERM: all ranks save, and end
        self._objective = objective_of(job.config)
        self._epochs, self._logging_steps = loader.epochs, job.config.logging_steps
        self._held: tuple[int, float, float, float, float, float, torch.Tensor] | None = None
        if runtime.rank == 0:
            print(job.summary, flush=True)
        if self._active:
            _keep_until(self._output / "metrics.jsonl", first_step)
            for name in ("eval.jsonl", "samples.jsonl"):
                _keep_until(self._output / name, first_step - 1 if job.eval_rows else first_step)
            self._bar = tqdm(
                total=job.total_steps,
                initial=first_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                file=Log(sys.stderr),
            )
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
        figures = dict(zip(self._objective.FIGURES, means, strict=True))
        self._bar.update()
        self._bar.set_postfix(
            loss=f"{figures['loss']:.4f}", tokens_s=f"{tokens / seconds:.0f}", host_s=f"{host:.3f}"
        )
        if step % self._logging_steps == 0:
            self._append(
                "metrics.jsonl",
                {
                    "step": step,
                    "epoch": self._epochs(step),
                    **figures,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    self._objective.UNIT: int(units),
                    "tokens_per_second": tokens / seconds,
                    "step_seconds": seconds,
                    "host_seconds": host,
                    "data_wait_seconds": waited,
                    "save_stall_seconds": stalled,
                    "compilations": self._runtime.compilations(),
                },
            )

    def evaluation(self, step: int, found: Evaluation, samples: list[dict[str, str]]) -> None:
        """Write an evaluation after `step` steps, with the perplexity where the loss is per target token, and
        samples, the results of Samples.answers."""
        if self._active:
            unit = self._objective.UNIT
            perplexity = {}
            if unit == "target_tokens":
                perplexity = {"perplexity": math.exp(min(found.loss, MOST_NATS))}
            figures = {f"eval_{name}": value for name, value in found.figures.items()}
            shown = "".join(f", {name} {value:.4g}" for name, value in perplexity.items())
            accuracy = found.figures.get("rewards/accuracies")
            shown += "" if accuracy is None else f", accuracy {accuracy:.4g}"
            say(
                f"step {step}: evaluation loss {found.loss:.4f}{shown} over {found.units} "
                f"{unit.replace('_', ' ')}"
            )
            self._append(
                "eval.jsonl",
                {"step": step, "epoch": self._epochs(step)}
                | figures
                | perplexity
                | {unit: found.units, "compilations": self._runtime.compilations()},
            )
            for sample in samples:
                self._append("samples.jsonl", {"step": step} | sample)
            for sample in samples[:1]:
                say(f"step {step}: asked {sample['prompt']!r}, answered {sample['answer']!r}")
            self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (an evaluation, a checkpoint) from the next step's seconds."""
        if self._active:
            self._host.take()
            self._last = time.perf_counter()

    def stopped(self, step: int) -> None:
        """Print that the run ends early, after `step` steps."""
        if self._active:
            say(f"stopped after step {step} of {self._bar.total}: --resume latest goes on")

    def close(self) -> None:
        """Write the values that are held, and end the progress bar. Raises the OSError of a file that could
        not be written."""
        self.flush()
        if self._active:
            self._bar.close()
        if self._failed:
            raise self._failed

    def _append(self, name, record):
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }  # JSON has no NaN
        if self._failed:
            return
        try:
            with open(self._output / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            self._failed = OSError(f"{self._output / name} could not be written: {error.strerror}")
            self._stop.set()
            say(f"error: {self._failed}: the run saves its state, and ends", sys.stderr)


class Log:
    """A stream that is written to as far as it can be: a log that takes no more, as on a full disk, is no
    reason to end a run."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def say(text: str, file=None) -> None:
    """Print a line above the progress bar, on stdout or `file`."""
    tqdm.write(text, Log(file or sys.stdout))


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a line that was cut off.

    What is kept has its name when it is complete. Raises OSError, and leaves the file, where it cannot be
    written.
    """
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        partial = path.with_name(path.name + ".partial")
        try:
            with naming(partial):
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
