"""The clock of a run: what is in the seconds of a step, with a runtime and a time that are made up."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from trainer import metrics
from trainer.metrics import Metrics


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only where a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_host_seconds_are_those_of_the_steps_graphs(tmp_path, clock):
    runtime = SimpleNamespace(
        rank=0, executes=True, listeners=[], read=torch.Tensor.tolist, compilations=lambda: 1
    )
    config = SimpleNamespace(output_dir=tmp_path, logging_steps=1)
    job = SimpleNamespace(
        config=config, summary="", eval_rows=[1], total_steps=3, terminated=threading.Event()
    )

    def mark_step(*seconds):
        """A graph that is recorded, and started."""
        for what, each in zip(("tracing", "traced", "started"), (0.0, *seconds), strict=True):
            clock.now += each
            for listener in runtime.listeners:
                getattr(listener, what)("graph")

    found = Metrics(runtime, job, 0, SimpleNamespace(epochs=float))
    mark_step(7, 7)
    found.evaluation(0, 1.0, 1, [])
    for step in range(1, 4):
        mark_step(step, 0.5)
        clock.now += 10  # of the host, but in no mark_step
        mark_step(0.25, 0.25)
        found.hold(step, 0.1, 0.0, 0.0, torch.ones(4))
        if step == 2:
            found.flush()
            mark_step(7, 7)
            found.restart_clock()
    found.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["host_seconds"] for line in lines] == [2.0, 3.0, 4.0]
    assert [line["step_seconds"] for line in lines] == [12.0, 13.0, 14.0]


@pytest.mark.parametrize(("local_rank", "said"), [("0", "stopped after step 7\n"), ("1", ""), (None, "")])
def test_each_machine_says_that_a_run_was_stopped(tmp_path, monkeypatch, capsys, local_rank, said):
    """tools/launch/node.sh looks for it on every machine; rank 0 says more."""
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    else:
        monkeypatch.delenv("LOCAL_RANK", raising=False)  # ranks are threads of one process
    config = SimpleNamespace(output_dir=str(tmp_path), logging_steps=1)
    job, loader = SimpleNamespace(config=config, terminated=None), SimpleNamespace(epochs=None)
    Metrics(SimpleNamespace(rank=32, executes=True), job, 0, loader).stopped(7)
    assert capsys.readouterr().out == said
