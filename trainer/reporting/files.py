"""The files of a run: JSON lines that a resumed run continues."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from model.weights.hub import naming
from trainer.reporting.console import say

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "eval.jsonl", "samples.jsonl"
STARTS = "starts.jsonl"


class RunFiles:
    """Appends lines to the files in --output_dir.

    Where a line cannot be written, `stop` is called, so that the run saves its state and ends, and `error`
    is the OSError.
    """

    def __init__(self, output: Path, stop: Callable[[], None]):
        self._output, self._stop = output, stop
        self.error: OSError | None = None

    def continue_from(self, first_step: int, evaluates: bool) -> tuple[int, bool]:
        """Drop what a run writes again that begins after `first_step` steps, with an evaluation or without.

        Returns what there was before: (the last step, or -1; whether `first_step` had an evaluation). Raises
        OSError, and leaves the file, where it cannot be written.
        """
        steps, evaluations = (
            [step for line in read_lines(self._output / name) if (step := step_of(line)) < math.inf]
            for name in (METRICS, EVALUATIONS)
        )
        drop_after(self._output / METRICS, first_step)
        for name in (EVALUATIONS, SAMPLES):
            drop_after(self._output / name, first_step - 1 if evaluates else first_step)
        return max([*steps, *evaluations], default=-1), first_step in evaluations

    def append(self, name: str, record: dict) -> None:
        """Write a line, in which numbers that are not finite are null: JSON has no NaN."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        if self.error:
            return
        try:
            with open(self._output / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            self.error = OSError(f"{self._output / name} could not be written: {error.strerror}")
            self._stop()
            say(f"error: {self.error}: the run saves its state, and ends", sys.stderr)


def drop_after(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that was cut off.

    What is kept has its name when it is complete. Raises OSError, and leaves the file, where it cannot be
    written.
    """
    if path.exists():
        kept = [line for line in read_lines(path) if step_of(line) <= step]
        partial = path.with_name(path.name + ".partial")
        try:
            with naming(partial):
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file; none where there is no file."""
    return iter(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])


def step_of(line: str) -> float:
    """The step of a line; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
