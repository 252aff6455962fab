"""What a run prints while it trains: lines in a log, a bar on a terminal."""

import io

import pytest

from trainer.reporting import console
from trainer.reporting.console import Progress

RECORD = {
    "step": 3,
    "loss": 1.23456,
    "grad_norm": 0.5,
    "learning_rate": 0.0002,
    "tokens_per_second": 5123.4,
    "mfu": 0.4123,
    "step_seconds": 2.0,
    "host_seconds": 0.1,
    "compilations": 2,
}


class Stream(io.StringIO):
    terminal = False

    def isatty(self):
        return self.terminal


def shown(monkeypatch, terminal, *records):
    stream = Stream()
    stream.terminal = terminal
    monkeypatch.setattr(console.sys, "stderr", stream)
    progress = Progress(0, 1800)
    for record in records:
        progress.step(record, record["step"] % 3 == 0)
    progress.close()
    return stream.getvalue()


def test_a_line_for_each_logged_step(monkeypatch):
    start = "step 3/1800: loss 1.2346, grad norm 0.5, lr 0.0002, 5123 tokens/s"
    assert shown(monkeypatch, False, RECORD | {"step": 2, "step_seconds": 8.0}, RECORD) == (
        f"{start}, mfu 41.2%, 2 compilations, 2:29:45 left\n"  # 1797 steps of 5 seconds
    )
    assert shown(monkeypatch, False, RECORD | {"mfu": None}) == f"{start}, 2 compilations, 59:54 left\n"
    assert "loss nan" in shown(monkeypatch, False, RECORD | {"loss": float("nan")})


@pytest.mark.parametrize("step", [2, 3])
def test_a_bar_on_a_terminal(monkeypatch, step):
    text = shown(monkeypatch, True, RECORD | {"step": step})
    assert "| 1/1800 [" in text and "host_s=0.100, loss=1.2346, tokens_s=5123" in text and "mfu" not in text
