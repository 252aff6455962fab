"""The numbers of a line in metrics.jsonl, with a runtime, a time and a device that are made up."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from model.config import ModelConfig
from model.lora import LoraConfig
from model.weights.shapes import base_shapes
from parallel.runtime.peaks import Peak
from trainer.config import Config
from trainer.config_derived import SAMPLE
from trainer.evaluation import Evaluation
from trainer.job import StopRequest
from trainer.reporting import metrics
from trainer.reporting.metrics import Metrics


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only where a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def started(config, lora=None, world_size=1, memory=None):
    """(the runtime of rank 0, the metrics of a run of three steps)."""
    runtime = SimpleNamespace(
        rank=0,
        world_size=world_size,
        executes=True,
        listeners=[],
        read=torch.Tensor.tolist,
        compilations=lambda: 1,
        device_memory=lambda: memory,
    )
    job = SimpleNamespace(
        config=config,
        model_config=ModelConfig.from_pretrained(SAMPLE / "tiny"),
        model_reference="tiny",
        lora=lora,
        summary="",
        eval_rows=[1],
        total_steps=3,
        stop_request=StopRequest(),
    )
    return runtime, Metrics(runtime, job, 0, SimpleNamespace(epochs=float))


def test_host_seconds_are_those_of_the_steps_graphs(tmp_path, clock):
    runtime, found = started(Config(output_dir=str(tmp_path)))

    def mark_step(*seconds):
        """A graph that is recorded, and started."""
        for what, each in zip(("tracing", "traced", "started"), (0.0, *seconds), strict=True):
            clock.now += each
            for listener in runtime.listeners:
                getattr(listener, what)("graph")

    mark_step(7, 7)
    found.evaluation(0, Evaluation(1, {"loss": 1.0}), [])
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


@pytest.mark.parametrize("bf16", [True, False])
def test_mfu_and_memory(tmp_path, clock, monkeypatch, bf16):
    """Two data parallel ranks, two accumulation steps, full training: 6 FLOPs a parameter and token."""
    peak = Peak(bf16=1e9, fp32=1e8)
    monkeypatch.setattr(metrics, "device_and_peak", lambda: ("a card", peak))
    config = Config(
        output_dir=str(tmp_path),
        lora_r=0,
        bf16=bf16,
        gradient_accumulation_steps=2,
        max_seq_length=16,
        gradient_checkpointing="full",
    )
    _, found = started(config, world_size=2, memory=(5, 7))
    clock.now += 4
    found.hold(1, 0.1, 0.0, 0.0, torch.ones(4))
    found.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    start = json.loads((tmp_path / "starts.jsonl").read_text())
    shapes = base_shapes(ModelConfig.from_pretrained(SAMPLE / "tiny"))
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if "proj" in name or "lm_head" in name)
    tokens_of_a_rank = 2 * 16
    least = 6 * matrices * tokens_of_a_rank / (peak.bf16 if bf16 else peak.fp32) / 4
    assert least < line["mfu"] < 1.05 * least  # attention's scores are the rest
    assert (line["device_memory_bytes"], line["device_memory_peak_bytes"]) == (5, 7)
    assert 1e7 < line["host_memory_bytes"] < 1e11
    assert (start["device"], start["device_peak_flops"]) == ("a card", peak.bf16 if bf16 else peak.fp32)
    assert start["parameters"] == start["trained_parameters"] == sum(map(math.prod, shapes.values()))
    assert start["flags"]["max_seq_length"] == 16


def test_where_no_peak_is_known(tmp_path, clock):
    _, found = started(Config(output_dir=str(tmp_path)), LoraConfig(4, 8.0, 0.0, ("q_proj",), False))
    clock.now += 4
    found.hold(1, 0.1, 0.0, 0.0, torch.ones(4))
    found.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["mfu"] is line["device_memory_bytes"] is line["device_memory_peak_bytes"] is None


@pytest.mark.parametrize(("local_rank", "said"), [("0", "stopped after step 7\n"), ("1", ""), (None, "")])
def test_each_machine_says_that_a_run_was_stopped(tmp_path, monkeypatch, capsys, local_rank, said):
    """tools/launch/node.sh looks for it on every machine; rank 0 says more."""
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    else:
        monkeypatch.delenv("LOCAL_RANK", raising=False)  # ranks are threads of one process
    config = Config(output_dir=str(tmp_path))
    job, loader = SimpleNamespace(config=config, stop_request=StopRequest()), SimpleNamespace(epochs=None)
    Metrics(SimpleNamespace(rank=32, executes=True), job, 0, loader).stopped(7)
    assert capsys.readouterr().out == said
