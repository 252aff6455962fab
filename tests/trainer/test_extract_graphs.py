"""NEURON_EXTRACT_GRAPHS_ONLY=1, as neuron_parallel_compile sets it, on XLA:CPU: what a rank computes is
replaced by NaN."""

import json
import os

import pytest
import torch

from parallel.graph.live import live_tensors
from parallel.runtime import ThreadRuntime
from tests.support.on_ranks import on_ranks, run_program
from tests.support.runs import SHORT, prepare_on_a_rank

pytestmark = pytest.mark.process

FLAGS = [
    *SHORT,
    "--replay",
    "false",
    "--max_steps",
    "10",
    "--gradient_accumulation_steps",
    "2",
    "--do_eval",
    "--eval_steps",
    "3",
    "--save_steps",
    "4",
    "--tensor_parallel_size",
    "2",
    "--lora_dropout",
    "0.1",
    "--save_total_limit",
    "2",
    "--eval_samples",
    "1",
]
# The variables that torchrun sets for one process.
PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
    "PJRT_DEVICE": "CPU",
}


class Collecting(ThreadRuntime):
    """Remembers its graphs; where nothing would be executed, all numbers of all ranks are NaN after a
    mark_step."""

    def __init__(self, runtime):
        super().__init__(runtime.rank, runtime.world_size, runtime.device, runtime._lockstep)
        self.graphs = []

    def _compile(self, name, graph, pending):
        self.graphs.append((name, graph))
        super()._compile(name, graph, pending)

    def _end_graph(self, name, before=None, record=None):
        super()._end_graph(name, before, record)
        self.barrier()
        if self.rank == 0 and not self.executes:
            for tensor in (each for tensors in live_tensors(self.world_size) for each in tensors):
                if tensor.is_floating_point():
                    tensor.data = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype).to(tensor.device)
        self.barrier()


def collect(runtime, output):
    """The graphs of a run, and of one that only collects them and whose time is over at its start."""
    from trainer.job import lock
    from trainer.loop import run

    graphs = []
    for name, extracts in (("whole", False), ("collected", True)):
        runtime.barrier()
        os.environ["NEURON_EXTRACT_GRAPHS_ONLY"] = str(int(extracts))
        runtime.barrier()
        late = ["--max_minutes", "0.001"] if extracts else []
        job = prepare_on_a_rank(runtime, [*FLAGS, *late, "--output_dir", f"{output}/{name}"])
        if runtime.rank == 0:
            lock(f"{output}/{name}")
        collecting = Collecting(runtime)
        run(collecting, job)
        graphs.append(collecting.graphs)
    return graphs


def test_a_run_that_collects_graphs_has_those_of_the_real_one_and_leaves_nothing(tmp_path):
    """It goes through to the end: that all ranks wish to stop is a value that is not read."""
    whole, collected = on_ranks(collect, 2, output=str(tmp_path))[0]
    # How many tokens an answer has is decided by values.
    assert set(collected) == set(whole)
    assert [graph for graph in collected if graph[0] != "decode"] == [
        graph for graph in whole if graph[0] != "decode"
    ]
    names = {name for name, _ in whole}
    assert (
        len(set(whole)) == len(names) and {"build", "micro_batch", "update", "evaluation", "decode"} < names
    )
    assert os.listdir(tmp_path) == ["whole"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "checkpoint-10",
        "checkpoint-8",
        "eval.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "starts.jsonl",
    ]


def test_a_process_as_on_neuron_collects_and_trains(tmp_path):
    """One rank, of a process group: the whole program, first collecting, then for good."""
    program = (
        "import sys, parallel.runtime.devices as devices; devices.on_neuron = lambda: True\n"
        "import trainer.main; sys.exit(trainer.main.main())"
    )
    flags = [
        "--max_steps",
        "2",
        "--max_seq_length",
        "64",
        "--parallel_layers",
        "native",
        "--output_dir",
        tmp_path / "out",
    ]
    for extracts in ("1", "0"):
        assert not (tmp_path / "out").exists()
        environment = os.environ | PROCESS | {"NEURON_EXTRACT_GRAPHS_ONLY": extracts}
        done = run_program(["-c", program, *flags], environment=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("graphs are collected, nothing is computed" in done.stdout) == (extracts == "1")
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2 and all(5 < loss < 8 for loss in losses)
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").is_file()
