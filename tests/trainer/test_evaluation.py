"""Loss and perplexity of held-out rows compared with transformers, and the answers during a run."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from tests.model.test_generation import save_lora
from tests.support.examples import rows_of
from tests.support.on_ranks import on_ranks
from tests.support.runs import read, several_runs
from tools.merge_checkpoint.merging import merge
from trainer.reporting.samples import questions


def examples():
    """[(ids, trained)] of 11 examples, and groups of them for 5 rows of 48 tokens."""
    generator = torch.Generator().manual_seed(2)
    lengths, first = [20, 9, 11, 48, 30, 2, 14, 25, 23, 40, 7], [5, 3, 10, 20, 29, 1, 0, 24, 7, 39, 2]
    made = [
        (
            torch.randint(3, 512, (length,), generator=generator).numpy(),
            [place >= start for place in range(length)],
        )
        for length, start in zip(lengths, first, strict=True)
    ]
    return made, [[0, 1, 2], [3], [4, 5, 6], [7, 8], [9, 10]]


def evaluated(runtime, checkpoint):
    """{dp: (loss, targets)} of an unmerged model by the loop's evaluation: 5 rows, batches of 2 per rank."""
    from pathlib import Path

    from data.loader import Loader
    from parallel.mesh import Mesh
    from tools.model_source import ModelSource
    from trainer.evaluation import evaluate

    made, groups = examples()
    source, found = ModelSource.of_checkpoint(Path(checkpoint)), {}
    for dp in (1, 2, 4):
        mesh = Mesh.create(runtime.rank, runtime.world_size, runtime.world_size // dp)
        model = source.build(mesh.tp, runtime.device, torch.float32, sequence_parallel=dp < 4)
        runtime.mark_step()
        loader = Loader(
            rows_of(made, groups, 48),
            batch_size=2,
            accumulation=1,
            dp_rank=mesh.dp.rank(),
            dp_size=dp,
            seed=0,
        )
        found[dp] = evaluate(runtime, model, loader, mesh)
    return found


@pytest.mark.process
def test_perplexity_is_that_of_the_merged_model(tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint = save_lora(tmp_path)
    merge(checkpoint, tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    total, targets = 0.0, 0
    for ids, trained in examples()[0]:
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(trained)[1:]
        total += F.cross_entropy(logits[wanted], torch.tensor(ids)[1:][wanted], reduction="sum").item()
        targets += int(wanted.sum())
    for found in on_ranks(evaluated, 4, checkpoint=str(checkpoint)):
        for dp, (counted, figures) in found.items():
            loss = figures["loss"]
            assert counted == targets and abs(math.exp(loss) / math.exp(total / targets) - 1) < 1e-4, (
                f"dp {dp}: {loss}"
            )


def test_examples_as_questions():
    whole = ([8, 9, 10, 11], [True] * 4)
    rows = rows_of(
        [
            ([3, 4, 5, 6], [False, False, True, True]),
            whole,
            ([3, 4, 5, 6, 7], [False, True, False, True, True]),
        ],
        [[0, 1], [2]],
        9,
    )
    asked = [(each.prompt, each.expected) for each in questions(rows, 8)]
    assert asked == [([3, 4], [5, 6]), ([8, 9], [10, 11]), ([3], [4])]
    assert [(each.source, each.example) for each in questions(rows, 8, 2)] == [(0, 0), (0, 1)]
    assert [each.prompt for each in questions(rows, 1)] == [[3]]


@pytest.mark.process
def test_a_run_answers_between_its_steps(tmp_path):
    """Compared with the same run without answers, there are two more graphs, and the training is the same.

    The topology is tp 2 x dp 2 with sequence parallelism.
    """
    flags = [
        "--max_steps",
        "4",
        "--do_eval",
        "--max_seq_length",
        "64",
        "--tensor_parallel_size",
        "2",
        "--skip_bad",
        "--learning_rate",
        "1e-2",
        "--eval_steps",
        "2",
    ]
    ask = ["--eval_samples", "3", "--on_recompile", "error"]
    on_ranks(
        several_runs,
        4,
        commands=[
            [*flags, "--output_dir", str(tmp_path / "not")],
            [*flags, *ask, "--output_dir", str(tmp_path / "asked")],
        ],
    )
    without, steps = read(tmp_path / "not"), read(tmp_path / "asked")
    assert [line["loss"] for line in steps] == [line["loss"] for line in without]
    assert {line["compilations"] - without[-1]["compilations"] for line in steps} == {2}
    evaluations, samples = (read(tmp_path / "asked", name) for name in ("eval.jsonl", "samples.jsonl"))
    assert all(line["perplexity"] == math.exp(line["eval_loss"]) for line in evaluations)
    assert [line["step"] for line in samples] == [0] * 3 + [2] * 3 + [4] * 3
    assert all(line["prompt"].startswith("### Instruction\n") and line["expected"] for line in samples)
    assert len({line["prompt"] for line in samples}) == 3 and {line["answer"] for line in samples[:3]} != {""}
    assert (
        json.loads((tmp_path / "asked" / "checkpoint-4" / "prompt_format.json").read_text())["chat"] is False
    )
