"""What a run prints while it trains: a progress bar on a terminal, else a line for each logged step."""

import sys
from collections import deque
from contextlib import suppress
from statistics import fmean

from tqdm import tqdm

RECENT = 20  # steps whose mean tells the time that is left


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


class Progress:
    """Shows on stderr how far a run is: a bar on a terminal, else lines."""

    def __init__(self, first_step: int, total_steps: int):
        self.total_steps, self._seconds = total_steps, deque(maxlen=RECENT)
        log = Log(sys.stderr)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            file=log,
            disable=not log.isatty(),
        )

    def step(self, record: dict, logged: bool) -> None:
        """A step has ended whose line in metrics.jsonl is `record`; whether that line is `logged`."""
        self._seconds.append(record["step_seconds"])
        if not self._bar.disable:
            self._bar.update()
            self._bar.set_postfix(
                loss=f"{record['loss']:.4f}",
                tokens_s=f"{record['tokens_per_second']:.0f}",
                host_s=f"{record['host_seconds']:.3f}",
            )
        elif logged:
            left = fmean(self._seconds) * (self.total_steps - record["step"])
            say(log_line(record, self.total_steps, left), sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def log_line(record: dict, total_steps: int, seconds_left: float) -> str:
    """The line of a step in a log."""
    mfu = f", mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
    return (
        f"step {record['step']}/{total_steps}: loss {record['loss']:.4f}, "
        f"grad norm {record['grad_norm']:.4g}, lr {record['learning_rate']:.3g}, "
        f"{record['tokens_per_second']:.0f} tokens/s{mfu}, {record['compilations']} compilations, "
        f"{tqdm.format_interval(seconds_left)} left"
    )
