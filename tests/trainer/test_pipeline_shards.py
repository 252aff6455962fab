"""Stages asked during training, and their checkpoints asked, evaluated, inspected and merged, beside
transformers and peft."""

import pytest
import torch

from data.loader import Loader
from tests.model.test_generation import asked
from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.runs import read, several_runs, start
from tests.support.saved import TOKENIZER
from tests.tools.test_inspect_checkpoint import flip
from tools.inspect_checkpoint.__main__ import main as inspect
from tools.merge_checkpoint.__main__ import main as merge
from trainer.config import parse
from trainer.job import prepare
from trainer.prompts import PromptFormat
from trainer.reporting.samples import NEW_TOKENS, questions

pytestmark = pytest.mark.process

STAGES = [
    "--pipeline_parallel_size",
    "2",
    "--tensor_parallel_size",
    "2",
    "--per_device_train_batch_size",
    "2",
]
DATA = ["--max_seq_length", "96", "--do_eval", "--validation_split_percentage", "4"]
# Three layers on two stages: the second one has a padding layer.
MODES = {
    "lora": (
        False,
        [
            "--lora_r",
            "4",
            "--lora_target_modules",
            "q_proj,down_proj,lm_head",
            "--learning_rate",
            "3e-2",
            "--eval_samples",
            "3",
        ],
    ),
    "full": (True, ["--lora_r", "0", "--learning_rate", "1e-2", "--zero_1"]),
}
NEW = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory in which both runs, of four steps, have left <mode>/checkpoint-4 and eval.jsonl, and
    lora/samples.jsonl."""
    directory = tmp_path_factory.mktemp("stages")
    commands = []
    for mode, (tied, flags) in MODES.items():
        save_llama(directory / f"{mode}-base", tied=tied, hidden_size=32, intermediate_size=48)
        commands.append(
            [
                "--model_id",
                str(directory / f"{mode}-base"),
                *STAGES,
                *DATA,
                *flags,
                "--max_steps",
                "4",
                "--output_dir",
                str(directory / mode),
            ]
        )
    on_ranks(several_runs, 4, commands=commands)
    return directory


def reference(directory, mode, monkeypatch):
    """The trained model in transformers: merged, or under LoRA the base with the adapter in peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint, output = str(directory / mode / "checkpoint-4"), directory / f"{mode}-written"
    monkeypatch.setattr(
        "sys.argv", ["merge", checkpoint, str(output), *(["--adapter_only"] if mode == "lora" else [])]
    )
    assert merge() == 0
    if mode == "full":
        return AutoModelForCausalLM.from_pretrained(output).eval()
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory / "lora-base"), output
    ).eval()


def dense_loss(model, rows):
    """Loss per target token, each example of a row alone."""
    total, count = 0.0, 0
    for batch in Loader(
        rows, batch_size=1, accumulation=1, dp_rank=0, dp_size=1, seed=0
    ).evaluation_batches():
        for segment in range(1, int(batch["segment_ids"].max()) + 1):
            where = batch["segment_ids"][0] == segment
            labels = batch["labels"][0, where]
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"][:, where]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def text_of(model, prompt, new):
    return TOKENIZER.decode(asked(model, prompt, new, TOKENIZER.eos_token_id), skip_special_tokens=True)


def test_the_trained_stages_are_evaluated_and_asked(trained, monkeypatch):
    checkpoints = {mode: trained / mode / "checkpoint-4" for mode in MODES}
    said = start(
        "--checkpoint",
        *checkpoints.values(),
        *DATA,
        "--tensor_parallel_size",
        2,
        "--max_new_tokens",
        NEW,
        "--output",
        trained / "page",
        program=("-m", "tools.evaluate"),
    ).stdout
    rows = prepare(
        parse(["--model_id", str(trained / "lora-base"), *DATA, "--output_dir", str(trained / "rows")]), 1
    ).eval_rows
    answered = [line["answers"] for line in read(trained / "page", "answers.jsonl")]
    held_out = questions(rows, 512 - NEW)
    assert len(answered) == len(held_out) > 3
    for mode, checkpoint in checkpoints.items():
        model = reference(trained, mode, monkeypatch)
        before, after = [line["eval_loss"] for line in read(trained / mode, "eval.jsonl")]
        assert after < before - 0.3
        assert dense_loss(model, rows) == pytest.approx(after, rel=1e-5)
        [shown] = [line for line in said.splitlines() if line.startswith(f"{checkpoint}: loss")]
        assert float(shown.split("loss ")[1].split(",")[0]) == pytest.approx(after, rel=1e-3)
        if mode == "lora":
            during = [line["answer"] for line in read(trained / mode, "samples.jsonl") if line["step"] == 4]
            assert during == [text_of(model, each.prompt, NEW_TOKENS) for each in held_out[:3]]
        assert [each[str(checkpoint)]["answer"] for each in answered] == [
            text_of(model, each.prompt, NEW) for each in held_out
        ]
    # By one rank, from the shards of four: the tied model, which is the last one above.
    expected = text_of(model, PromptFormat.of("instruction").encode(TOKENIZER, "Who?"), NEW)
    said = start(
        "--checkpoint",
        checkpoint,
        "--instruction",
        "Who?",
        "--max_new_tokens",
        NEW,
        program=("-m", "tools.generate"),
    )
    assert said.stdout == f"### Instruction\nWho?\n### Answer\n{expected}\n"


def test_inspect_checkpoint_names_the_shard_of_a_stage(trained, capsys):
    checkpoint = trained / "lora" / "checkpoint-4"
    assert inspect([str(checkpoint)]) == 0
    assert "4: 2 tensor x 1 data parallel x 2 pipeline stages" in capsys.readouterr().out
    file = checkpoint / "rank-00003.safetensors"
    content = file.read_bytes()
    flip(file, 8 + int.from_bytes(content[:8], "little"))  # in its first tensor
    assert inspect([str(checkpoint)]) == 1
    text, name = capsys.readouterr().out, "parameter/model.layers.2.self_attn.q_proj.lora_B.weight"
    assert f"{file} is damaged: the bytes of {name} are not" in text and text.count(" is damaged: ") == 1
    for problem, damage in (
        (f"has {len(content) - 1} bytes of {len(content)}", lambda: file.write_bytes(content[:-1])),
        ("is missing", file.unlink),
    ):
        damage()
        assert inspect([str(checkpoint)]) == 1
        assert capsys.readouterr().err == f"error: {file} {problem}: the checkpoint is damaged\n"
    file.write_bytes(content)
