"""Whole runs on preference pairs: training, evaluation, resuming, and what the tools do with them."""

import json
import math
import random

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.on_ranks import on_ranks, run_program
from tests.support.runs import column, read, several_runs, start
from tools.evaluate.report import Measured, loss_of_chosen, preferences
from trainer.config_derived import SAMPLE

pytestmark = pytest.mark.process
FLAGS = "--objective dpo --do_eval --validation_split_percentage 20 --max_seq_length 256 --learning_rate 1e-2"
FLAGS += " --lr_scheduler_type constant --max_steps 20 --save_steps 10 --dpo_beta 0.2"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of the embedded sample: each answer, and its words in another order."""
    file, shuffle = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(0).shuffle
    with open(SAMPLE / "instructions.jsonl", encoding="utf-8") as lines, open(file, "w") as out:
        for record in map(json.loads, lines):
            words = record["response"].split()
            shuffle(words)
            if " ".join(words) != record["response"]:
                answers = {"chosen": record["response"], "rejected": " ".join(words)}
                out.write(json.dumps({"prompt": record["instruction"] + "\n"} | answers) + "\n")
    return file


def test_a_run_learns_to_prefer_and_resumes_on_another_topology(tmp_path, pairs):
    """The reference is that of the start, also where half of the training is done."""
    flags = [*FLAGS.split(), "--dataset", str(pairs), "--on_recompile", "error"]
    first, second = tmp_path / "first", tmp_path / "second"
    command = [*flags, "--tensor_parallel_size", "2", "--per_device_train_batch_size", "4"]
    on_ranks(several_runs, 4, commands=[[*command, "--output_dir", str(first)]])
    begin, end = read(first, "eval.jsonl")
    assert abs(begin["eval_loss"] - math.log(2)) < 1e-6 and begin["eval_rewards/margins"] == 0
    assert end["eval_rewards/accuracies"] > 0.9 and end["eval_loss"] < 0.5 and end["pairs"] > 20
    assert "perplexity" not in end
    reference = load_file(first / "checkpoint-20" / "reference.safetensors")
    assert len(reference["evaluate"]) == 2 * end["pairs"] and (reference["train"] < 0).all()

    command = [*flags, "--pipeline_parallel_size", "2", "--per_device_train_batch_size", "8"]
    resume = ["--resume", str(first / "checkpoint-10"), "--output_dir", str(second)]
    on_ranks(several_runs, 2, commands=[[*command, *resume]])
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        assert np.allclose(column(second, name), column(first, name)[10:], rtol=1e-4, atol=1e-4), name
    found = load_file(second / "checkpoint-20" / "reference.safetensors")
    assert all((found[name] == reference[name]).all() for name in reference)


def test_a_run_of_sft_cannot_resume_as_dpo(tmp_path, pairs):
    output = ["--output_dir", tmp_path / "out"]
    data = ["--dataset", pairs, "--data_cache_dir", tmp_path / "cache"]
    done = run_program(["trainer/main.py", *data, *output])
    assert done.returncode == 1 and "jsonl:1: a chosen and a rejected answer: --objective dpo" in done.stderr
    start("--max_steps", "1", "--max_seq_length", "64", *output)
    done = run_program(["trainer/main.py", *FLAGS.split(), *data, *output, "--resume", "latest"])
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith("error: ") and "its data is" in error, error


def test_what_models_prefer():
    first = np.array([-5, -4, -3, -6, -2, -9], np.float32)
    later = np.array([-4, -5, -4, -6, -2, -8], np.float32)
    assert preferences(None, None) == {} and preferences(first, first) == {"preferred": 2 / 3}
    assert preferences(later, first) == {"preferred": 1.0, "preferred_more": 1 / 3}
    assert Measured(1.0, []).logps is None


def test_the_loss_of_the_chosen_answers():
    from tests.support.examples import rows_of

    examples = [(range(4), [False, False, True, True]), (range(3), [True] * 3)]
    rows = rows_of(examples, [[0, 1]], 8)
    assert loss_of_chosen(rows, np.array([-3.0, -7.0])) == 1.5
