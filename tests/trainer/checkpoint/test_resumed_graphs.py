"""A run that resumes gathers the shares of a checkpoint in the graph "build"; its steps are a new run's."""

import pytest

from tests.support.on_ranks import on_ranks
from tests.support.runs import run_one

pytestmark = pytest.mark.process

FLAGS = "--max_seq_length 64 --per_device_train_batch_size 1 --tensor_parallel_size 2 --lora_r 0 --bf16"


def compiled(runtime, output):
    """The graphs that each of two runs has compiled: a new one, and one that goes on with it."""
    found = []
    for flags in ("--max_steps 2", "--max_steps 4 --resume latest"):
        before = runtime.compilations()
        run_one(runtime, [*f"{FLAGS} {flags}".split(), "--output_dir", output])
        runtime.barrier()
        found.append(runtime.compilations() - before)
    return found


def test_the_steps_of_a_resumed_run_are_those_of_a_new_one(tmp_path):
    """Three data parallel ranks and two replicas of the norms: shares with padding, gathered twice."""
    ranks = on_ranks(compiled, 6, output=str(tmp_path / "out"))
    assert {after for _, after in ranks} == {1} and min(new for new, _ in ranks) >= 1, ranks
