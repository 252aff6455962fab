"""Golden runs: ten steps of each way to train, compared with what an earlier version of the program computed.

    make golden         # writes tests/golden/*.json anew

A change that only moves or renames code keeps every number to the bit. What is meant to change a number, or
the operations of a graph, says so in its commit. Another kind of processor rounds otherwise: there the
numbers have to agree within a tolerance.
"""

import json
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from parallel.graph.hlo import Graph
from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import read, several_runs
from trainer.config_derived import SAMPLE

pytestmark = pytest.mark.process

GOLDEN, RANKS, STEPS = ROOT / "tests" / "golden", 4, 10
SHORT = "--max_seq_length 64 --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_ratio 0.1"
CASES = {
    "lora": "--tensor_parallel_size 2 --lora_r 4 --lora_dropout 0.1 --do_eval --eval_steps 5",
    "full": "--tensor_parallel_size 4 --lora_r 0 --weight_decay 0.1 --gradient_checkpointing",
    "bf16": "--tensor_parallel_size 2 --lora_r 4 --bf16 --gradient_checkpointing selective "
    "--sequence_parallel false",
    "stages": "--model_id {model} --random_weights --tensor_parallel_size 2 --pipeline_parallel_size 2 "
    "--per_device_train_batch_size 2 --lora_r 4 --lora_dropout 0.1 "
    "--gradient_accumulation_steps 2 --gradient_checkpointing --do_eval --eval_samples 1",
    "stages_in_one_graph": "--tensor_parallel_size 2 --pipeline_parallel_size 2 "
    "--per_device_train_batch_size 2 --lora_r 0 "
    "--mark_step step",
    "accumulation": "--tensor_parallel_size 2 --lora_r 4 --gradient_accumulation_steps 3",
    "zero_1": "--tensor_parallel_size 2 --lora_r 0 --zero_1 --gradient_accumulation_steps 2",
}
TOLERANCE = {"bf16": 0.02}


def processor() -> str:
    """The processor's name and numbers, and the versions that decide how products are rounded."""
    text = Path("/proc/cpuinfo").read_text()
    found = [
        re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
        for name in ("model name", "cpu family", "model", "stepping")
    ]
    return ", ".join([*(each[1] for each in found if each), f"torch_xla {version('torch_xla')}"])


def operations(runtime, commands):
    """Run the commands; [{graph: {operation: how many}}] of each, on rank 0."""
    found = []
    for command in commands:
        several_runs(runtime, [command])
        if runtime.rank == 0:
            found.append(
                {
                    name: dict(sorted(Graph(text).operations.items()))
                    for name, text in runtime.guard.texts.items()
                    if "ENTRY" in text
                }
            )
    return found


def three_layers(directory: Path) -> Path:
    """The embedded tiny model with a third layer: two stages hold two and one."""
    shutil.copytree(SAMPLE / "tiny", directory / "model")
    config = directory / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    return config.parent


def run_all(directory: Path) -> dict[str, dict]:
    """What each case computes."""
    model = three_layers(directory)
    commands = [
        [
            *SHORT.split(),
            *flags.format(model=model).split(),
            "--max_steps",
            str(STEPS),
            "--output_dir",
            f"{directory}/{name}",
        ]
        for name, flags in CASES.items()
    ]
    graphs, *_ = on_ranks(operations, RANKS, commands=commands)
    results = {}
    for (name, flags), counted in zip(CASES.items(), graphs, strict=True):
        output = directory / name
        lines = read(output)
        results[name] = {
            "flags": flags,
            "processor": processor(),
            "loss": [line["loss"] for line in lines],
            "grad_norm": [line["grad_norm"] for line in lines],
        }
        if "--do_eval" in flags:
            results[name]["eval_loss"] = [line["eval_loss"] for line in read(output, "eval.jsonl")]
        if "--eval_samples" in flags:
            results[name]["answers"] = [line["answer"] for line in read(output, "samples.jsonl")]
        results[name]["operations"] = counted
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_computes_what_it_did(results, name):
    expected, found = json.loads((GOLDEN / f"{name}.json").read_text()), results[name]
    assert found["operations"] == expected["operations"]
    if found["processor"] == expected["processor"]:
        assert found == expected
    assert found.keys() == expected.keys()
    for key in {"loss", "grad_norm", "eval_loss"} & expected.keys():
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE.get(name, 1e-4))


def write() -> None:
    """Make tests/golden/*.json what this version of the program computes."""
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, result in run_all(Path(directory)).items():
            (GOLDEN / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: loss {result['loss'][0]:.4f} -> {result['loss'][-1]:.4f}")
