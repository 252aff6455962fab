"""What a run says: metrics held on the device and read one step late, JSON lines, a progress bar."""

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import Loader
from parallel.runtime import Runtime
from trainer.job import Job
from trainer.objective import FIGURES

MOST_NATS = 700.0  # e to the power of more is no float


class Metrics:
    """Rank 0's record of a run; on other ranks, and where nothing is executed, every method does nothing.

    `OUT/metrics.jsonl` has one object a logged step, `OUT/eval.jsonl` one an evaluation, `OUT/samples.jsonl`
    one an answer of it. A step's values are read after the next step was marked, so the host never waits for
    the step that it has just started. A step's seconds are those from the mark_step before it to its own:
    tracing, compilation if it is new, and the wait for the step before.
    """

    def __init__(self, runtime: Runtime, job: Job, first_step: int, loader: Loader):
        self._runtime, self._output = runtime, Path(job.config.output_dir)
        self._active = runtime.rank == 0 and runtime.executes
        self._epochs, self._logging_steps = loader.epochs, job.config.logging_steps
        self._held: tuple[int, float, float, float, float, torch.Tensor] | None = None
        if runtime.rank == 0:
            print(job.summary, flush=True)
        if self._active:
            _keep_until(self._output / "metrics.jsonl", first_step)
            for name in ("eval.jsonl", "samples.jsonl"):
                _keep_until(self._output / name, first_step - 1 if job.eval_rows else first_step)
            self._bar = tqdm(
                total=job.total_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True
            )
            self._last = time.perf_counter()

    def hold(
        self, step: int, learning_rate: float, waited: float, stalled: float, report: torch.Tensor
    ) -> None:
        """Keep the report of the 1-based `step`, and write that of the step before it.

        waited: seconds for which the step waited for data. stalled: seconds for which a save before it held training up.
        report: what trainer.loop.update returned, on the device, part of the last mark_step.
        """
        if self._active:
            self.flush()
            now = time.perf_counter()
            self._held, self._last = (step, now - self._last, learning_rate, waited, stalled, report), now

    def flush(self) -> None:
        """Write what is held. The host waits here until the device has finished that step."""
        if not self._active or self._held is None:
            return
        (step, seconds, learning_rate, waited, stalled, report), self._held = self._held, None
        grad_norm, target_tokens, tokens, *means = self._runtime.read(report)
        figures = dict(zip(FIGURES, means, strict=True))
        self._bar.update()
        self._bar.set_postfix(loss=f"{figures['loss']:.4f}", tokens_s=f"{tokens / seconds:.0f}")
        if step % self._logging_steps == 0:
            self._append(
                "metrics.jsonl",
                {
                    "step": step,
                    "epoch": self._epochs(step),
                    **figures,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "target_tokens": int(target_tokens),
                    "tokens_per_second": tokens / seconds,
                    "step_seconds": seconds,
                    "data_wait_seconds": waited,
                    "save_stall_seconds": stalled,
                    "compilations": self._runtime.compilations(),
                },
            )

    def evaluation(self, step: int, loss: float, target_tokens: int, samples: list[dict[str, str]]) -> None:
        """Write the evaluation loss per target token, its perplexity, and the answers to samples after `step`
        steps."""
        if self._active:
            perplexity = math.exp(min(loss, MOST_NATS))
            tqdm.write(
                f"step {step}: evaluation loss {loss:.4f}, perplexity {perplexity:.4g} over {target_tokens} target tokens"
            )
            self._append(
                "eval.jsonl",
                {
                    "step": step,
                    "epoch": self._epochs(step),
                    "eval_loss": loss,
                    "perplexity": perplexity,
                    "target_tokens": target_tokens,
                    "compilations": self._runtime.compilations(),
                },
            )
            for sample in samples:
                self._append("samples.jsonl", {"step": step} | sample)
            for sample in samples[:1]:
                tqdm.write(f"step {step}: asked {sample['prompt']!r}, answered {sample['answer']!r}")
            self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was done since the last step (an evaluation, a checkpoint) out of the next step's time."""
        if self._active:
            self._last = time.perf_counter()

    def stopped(self, step: int) -> None:
        """Say that the run ends early, after `step` steps."""
        if self._active:
            tqdm.write(f"stopped after step {step} of {self._bar.total}: --resume latest goes on")

    def close(self) -> None:
        self.flush()
        if self._active:
            self._bar.close()

    def _append(self, name, record):
        with open(self._output / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines that a run which goes on will write again, and one that was cut off."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
