"""Whole runs of trainer/main.py, as a user starts them."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.models import peft_losses, save_adapter, save_llama
from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import SHORT, column, environment, read, several_runs, start
from tools.merge_checkpoint.merging import merge
from trainer.config import parse
from trainer.job import prepare

pytestmark = pytest.mark.process


def torchrun(processes):
    # --standalone: a free port, because tests run side by side.
    return (
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        ROOT / "trainer" / "main.py",
    )


def sharded_logits(runtime, checkpoint, base, tp, ids):
    """The whole vocabulary's logits of one example, by the model that was trained: its shards, not merged."""
    from functools import partial
    from pathlib import Path

    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import add_lora
    from model.weights.loading import fill
    from model.weights.sources import SafetensorsFiles
    from parallel.collectives import all_gather
    from parallel.mesh import Mesh
    from trainer.checkpoint.reader import Checkpoint

    mesh, checkpoint = Mesh.create(runtime.rank, runtime.world_size, tp), Checkpoint(Path(checkpoint))
    model = Llama(ModelConfig.from_pretrained(Path(base)), mesh.tp)
    if checkpoint.lora:
        add_lora(model, checkpoint.lora)
    fill(model, SafetensorsFiles(Path(base)), runtime.device, 0, partial(checkpoint.read, "parameter"))
    model.eval()
    with torch.no_grad():
        batch = [
            torch.tensor([values]).to(runtime.device) for values in (ids, range(len(ids)), [1] * len(ids))
        ]
        logits = all_gather(model(*batch), mesh.tp, -1)
    runtime.mark_step()
    return logits.cpu()


def check_merged(output, base, step, tp=2):
    """transformers' logits of the merged model are those of the sharded one; returns the merged model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(output / f"checkpoint-{step}", output / "merged")
    merged, loading = AutoModelForCausalLM.from_pretrained(output / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    assert AutoTokenizer.from_pretrained(output / "merged").eos_token == "</s>"
    ids = list(range(3, 60))
    with torch.no_grad():
        expected = merged.eval()(torch.tensor([ids])).logits
    for logits in on_ranks(
        sharded_logits, tp, checkpoint=str(output / f"checkpoint-{step}"), base=str(base), tp=tp, ids=ids
    ):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    return merged


def check_that_another_base_is_refused(output, base, step, flags):
    """The same names and shapes, other numbers: neither resumed on nor merged with."""
    save_llama(base, seed=9)
    for problem, call in [
        ("is not the model that", lambda: merge(output / f"checkpoint-{step}", output / "again")),
        ("is of another run: its base is", lambda: prepare(parse([*flags, "--resume", "latest"]), 4)),
    ]:
        with pytest.raises(ValueError, match=problem):
            call()
    assert not (output / "again").exists()


# World size -> (tp, dp), rows of a micro-batch and micro-batches: a global batch of 4 rows each; and flags.
TOPOLOGIES = {
    1: [(1, 1, 2, 2, "")],
    2: [(2, 1, 4, 1, ""), (1, 2, 1, 2, "--zero_1")],
    4: [
        (4, 1, 1, 4, "--sequence_parallel false --gradient_checkpointing selective"),
        (2, 2, 2, 1, "--zero_1 --gradient_checkpointing"),
    ],
    8: [(8, 1, 2, 2, "--sequence_parallel false"), (2, 4, 1, 1, "--zero_1")],
}
MODES = {
    "lora": ["--lora_r", "4", "--lora_dropout", "0.1"],
    "full": ["--lora_r", "0", "--weight_decay", "0.1"],
}


def test_the_topology_does_not_change_the_run(tmp_path):
    """10 losses and gradient norms over (tp, dp), rows divided over ranks and micro-batches in different
    ways."""
    curves = {"lora": {}, "full": {}}
    for world_size, topologies in TOPOLOGIES.items():
        commands = [
            [
                *SHORT,
                *flags,
                *more.split(),
                "--max_steps",
                "10",
                "--tensor_parallel_size",
                str(tp),
                "--per_device_train_batch_size",
                str(batch),
                "--gradient_accumulation_steps",
                str(accumulation),
                "--output_dir",
                f"{tmp_path}/{mode}-{tp}-{dp}",
            ]
            for tp, dp, batch, accumulation, more in topologies
            for mode, flags in MODES.items()
        ]
        on_ranks(several_runs, world_size, commands=commands)
        compiled = 0  # so far in this process
        for tp, dp, batch, accumulation, _ in topologies:
            assert (tp * dp, batch * dp * accumulation) == (world_size, 4)
            for mode, curve in curves.items():
                output = tmp_path / f"{mode}-{tp}-{dp}"
                curve[tp, dp] = torch.tensor(
                    [column(output, name) for name in ("loss", "grad_norm", "target_tokens")]
                )
                compiled += 1 if accumulation == 1 else 2
                assert column(output, "compilations") == [compiled] * 10
    for mode, curve in curves.items():
        dense = curve.pop((1, 1))
        assert dense[0, -1] < dense[0, 0] - 0.5
        for at, other in curve.items():
            torch.testing.assert_close(
                other, dense, rtol=1e-4, atol=0, msg=lambda text, at=at, mode=mode: f"{mode} {at}: {text}"
            )


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    flags = [
        *SHORT,
        "--lora_dropout",
        "0.1",
        "--world_size",
        4,
        "--tensor_parallel_size",
        2,
        "--max_steps",
        10,
        "--do_eval",
        "--save_steps",
        5,
        "--gradient_checkpointing",
        "--zero_1",
        "--report_to",
        "tensorboard",
    ]
    whole, halves, other = tmp_path / "whole", tmp_path / "halves", tmp_path / "other"
    start(*flags, "--output_dir", whole)
    halves.mkdir()
    shutil.copytree(whole / "checkpoint-5", halves / "checkpoint-5")
    # Stopped after the save: lines of steps that are done again, the last cut off, and a save that was not
    # completed.
    (halves / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in read(whole)[:7])[:-9])
    shutil.copytree(whole / "runs", halves / "runs")
    shutil.copytree(whole / "checkpoint-10", halves / "checkpoint-10.incomplete")
    start(*flags, "--output_dir", halves, "--resume", "latest", "--save_total_limit", 1)
    for name in ("step", "loss", "grad_norm", "learning_rate", "target_tokens"):
        assert column(halves, name) == column(whole, name)
    assert read(halves, "eval.jsonl")[-1]["eval_loss"] == read(whole, "eval.jsonl")[-1]["eval_loss"]
    curves = EventAccumulator(str(halves / "runs"))
    curves.Reload()
    drawn = [(event.step, event.value) for event in curves.Scalars("train/loss")]
    assert drawn == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in read(halves)]
    assert [line["step"] for line in read(halves, "starts.jsonl")] == [5]
    assert column(whole, "compilations") == [2] * 10  # the step and the evaluation
    assert [path.name for path in halves.glob("checkpoint-*")] == ["checkpoint-10"]
    # Another topology with the same global batch goes on too.
    start(
        *SHORT,
        "--lora_dropout",
        "0.1",
        "--world_size",
        4,
        "--tensor_parallel_size",
        4,
        "--max_steps",
        10,
        "--do_eval",
        "--gradient_accumulation_steps",
        2,
        "--output_dir",
        other,
        "--resume",
        whole / "checkpoint-5",
    )
    torch.testing.assert_close(column(other), column(whole)[5:], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "tied, rslora, targets",
    [
        (False, True, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (True, False, ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_lora_follows_peft_and_comes_back(tmp_path, tied, rslora, targets):
    """From peft's adapter through ten steps on TP2 x DP2 to peft's adapter and to a merged model, compared at
    each end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    adapted = save_adapter(save_llama(base, tied), adapter, targets, use_rslora=rslora)
    flags = [
        str(flag)
        for flag in (
            "--model_id",
            base,
            "--adapter_name_or_path",
            adapter,
            "--max_seq_length",
            64,
            "--learning_rate",
            "1e-2",
            "--lr_scheduler_type",
            "constant",
            "--world_size",
            4,
            "--tensor_parallel_size",
            2,
            "--gradient_accumulation_steps",
            2,
            "--max_steps",
            10,
            "--output_dir",
            output,
        )
    ]
    start(*flags)
    reference = peft_losses(
        adapted, prepare(parse([*flags, "--output_dir", f"{tmp_path}/rows"]), 4).train_rows
    )
    torch.testing.assert_close(column(output), reference, rtol=0, atol=1e-4)

    merged = check_merged(output, base, 10, tp=2 if tied else 8)  # of 4 KV heads, 8 ranks hold each twice
    start(
        output / "checkpoint-10",
        output / "adapter",
        "--adapter_only",
        program=("-m", "tools.merge_checkpoint"),
        forked=tied,  # once as a user starts it
    )
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter").eval()
    for (name, value), other in zip(adapted.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-3, msg=lambda text, at=name: f"{at}: {text}")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)
    if not tied:
        check_that_another_base_is_refused(output, base, 10, flags)


def test_full_training_comes_back(tmp_path):
    """A tied model in bf16, trained whole: the merged model has what the ranks hold."""
    base, output = tmp_path / "base", tmp_path / "out"
    before = save_llama(base, tied=True)
    start(
        *SHORT,
        "--model_id",
        base,
        "--lora_r",
        0,
        "--bf16",
        "--world_size",
        2,
        "--tensor_parallel_size",
        2,
        "--max_steps",
        3,
        "--output_dir",
        output,
    )
    merged = check_merged(output, base, 3)
    assert (merged.get_input_embeddings().weight - before.get_input_embeddings().weight).abs().max() > 1e-3
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


def test_torchrun_from_elsewhere_with_the_tutorials_flags(tmp_path):
    """The launch command of the LoRA tutorial, on a machine of 8 virtual devices."""
    save_llama(tmp_path / "base", num_key_value_heads=8)
    flags = f"""
        --model_id {tmp_path}/base --dataset {ROOT}/data/sample/instructions.jsonl --num_train_epochs 3
        --do_train --learning_rate 5e-5 --warmup_ratio 0.03 --max_steps 4
        --per_device_train_batch_size 1 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 2 --gradient_checkpointing true --bf16 --zero_1 false
        --tensor_parallel_size 8 --pipeline_parallel_size 1 --logging_steps 1 --save_total_limit 1
        --output_dir out --lr_scheduler_type constant --lora_r 16 --lora_alpha 32 --lora_dropout
        0.0 --lora_target_modules q_proj,k_proj,v_proj,o_proj --max_seq_length 128 --packing true
        --report_to none --overwrite_output_dir --logging_dir logs""".split()
    (tmp_path / "out").mkdir()
    for name in ("metrics.jsonl", "notes.txt"):
        (tmp_path / "out" / name).write_text("before\n")
    start(*flags, program=torchrun(8), cwd=tmp_path, forked=False)
    lines = read(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["compilations"] == 2
    for kept in ("notes.txt", "overwritten-1/metrics.jsonl"):
        assert (tmp_path / "out" / kept).read_text() == "before\n"
    assert all(
        set(line)
        == {
            "step",
            "epoch",
            "loss",
            "grad_norm",
            "learning_rate",
            "target_tokens",
            "tokens_per_second",
            "mfu",
            "step_seconds",
            "host_seconds",
            "data_wait_seconds",
            "save_stall_seconds",
            "device_memory_bytes",
            "device_memory_peak_bytes",
            "host_memory_bytes",
            "compilations",
        }
        for line in lines
    )
    assert all(0 < line["host_seconds"] < line["step_seconds"] for line in lines)


def test_thirty_two_ranks_compile_the_step_once(tmp_path):
    start(
        "--tensor_parallel_size",
        8,
        "--max_seq_length",
        64,
        "--max_steps",
        2,
        "--output_dir",
        tmp_path,
        program=torchrun(32),
        forked=False,
    )
    assert column(tmp_path, "compilations") == [1, 1]


def test_ctrl_c_ends_the_run_in_its_first_compilation(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "trainer/main.py",
            *SHORT,
            "--world_size",
            "2",
            "--max_steps",
            "100000",
            "--output_dir",
            tmp_path,
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("data: ")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert (
        process.returncode == 130 and "Traceback" not in errors and not (tmp_path / "metrics.jsonl").exists()
    )
