"""Whole runs of trainer/main.py, as a user starts them."""
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.models import save_adapter, save_llama
from tests.on_ranks import ROOT

SHORT = ["--max_seq_length", "64", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1"]


def start(*flags, check=True, program=("trainer/main.py",)):
    environment = {name: value for name, value in os.environ.items() if name not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    done = subprocess.run([sys.executable, *program, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=environment)
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


def read(output, name="metrics.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def losses(output):
    return [line["loss"] for line in read(output)]


TOPOLOGIES = [(1, 1, 2, 4), (2, 1, 4, 2), (4, 1, 8, 1), (8, 1, 2, 4), (1, 2, 1, 4), (2, 2, 4, 1), (2, 4, 1, 2)]


@pytest.mark.parametrize("lora", [["--lora_r", "4", "--lora_dropout", "0.1"], ["--lora_r", "0", "--weight_decay", "0.1"]])
def test_the_topology_does_not_change_the_run(tmp_path, lora):
    """10 losses and gradient norms over (tp, dp), rows divided over ranks and micro-batches in different ways."""
    curves = {}
    for tp, dp, batch, accumulation in TOPOLOGIES:
        assert batch * dp * accumulation == 8
        output = tmp_path / f"tp{tp}-dp{dp}"
        start(*SHORT, *lora, "--max_steps", 10, "--world_size", tp * dp, "--tensor_parallel_size", tp, "--output_dir", output,
              "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        lines = read(output)
        curves[tp, dp] = torch.tensor([[line["loss"], line["grad_norm"], line["target_tokens"]] for line in lines])
        assert lines[-1]["compilations"] == lines[1]["compilations"] == (1 if accumulation == 1 else 2)
    dense = curves.pop((1, 1))
    assert dense[-1, 0] < dense[0, 0] - 0.5
    for topology, curve in curves.items():
        torch.testing.assert_close(curve, dense, rtol=1e-4, atol=0, msg=lambda text, where=topology: f"{where}: {text}")


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    flags = [*SHORT, "--lora_dropout", "0.1", "--world_size", 4, "--tensor_parallel_size", 2, "--max_steps", 10, "--do_eval",
             "--save_steps", 5, "--gradient_checkpointing"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    start(*flags, "--output_dir", whole)
    start(*flags, "--output_dir", halves)
    for name in ("manifest.json",):
        (halves / "checkpoint-10" / name).unlink()
    import shutil
    shutil.rmtree(halves / "checkpoint-10")
    start(*flags, "--output_dir", halves, "--resume", "latest", "--save_total_limit", 1)
    assert losses(halves) == losses(whole)
    assert [line["grad_norm"] for line in read(halves)] == [line["grad_norm"] for line in read(whole)]
    assert read(halves, "eval.jsonl")[-1]["eval_loss"] == read(whole, "eval.jsonl")[-1]["eval_loss"]
    assert read(whole)[-1]["compilations"] == 2
    assert [path.name for path in halves.glob("checkpoint-*")] == ["checkpoint-10"]
    # Another topology with the same global batch goes on too.
    (tmp_path / "other").mkdir()
    start(*SHORT, "--lora_dropout", "0.1", "--world_size", 4, "--tensor_parallel_size", 4, "--max_steps", 10, "--do_eval",
          "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "other", "--resume", whole / "checkpoint-5")
    torch.testing.assert_close(losses(tmp_path / "other"), losses(whole)[5:], rtol=1e-4, atol=0)


def peft_losses(adapted, tokenizer, dataset, flags):
    """Ten steps of peft and torch.optim.AdamW on the rows of our loader, each segment alone in a row of its own."""
    from data.loader import Loader
    from data.packing import build_rows, pack
    from data.records import load_records, tokenize
    examples, *_ = tokenize(load_records(str(dataset)), tokenizer, 64)
    rows = build_rows(examples, pack([len(example.input_ids) for example in examples], 64), 64, 0)
    loader = Loader(rows, batch_size=1, accumulation=4, dp_rank=0, dp_size=1, seed=42)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    adapted.train()
    curve = []
    for step in range(10):
        total, count = 0.0, 0
        for batch in loader.step(step):
            for segment in range(1, int(batch["segment_ids"].max()) + 1):
                where = batch["segment_ids"][0] == segment
                ids, labels = batch["input_ids"][0, where][None], batch["labels"][0, where]
                logits = adapted(input_ids=ids).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += int((labels != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total.item() / count)
    return curve


@pytest.mark.parametrize("tied, rslora, targets", [(False, True, ["q_proj", "k_proj", "v_proj", "o_proj"]),
                                                   (True, False, ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])])
def test_lora_follows_peft_and_comes_back(tmp_path, tied, rslora, targets):
    """From peft's adapter through ten steps on TP2 x DP2 to peft's adapter and to a merged model, compared at each end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    adapted = save_adapter(save_llama(base, tied), adapter, targets, use_rslora=rslora)
    dataset = ROOT / "data" / "sample" / "instructions.jsonl"
    start("--model_id", base, "--adapter_name_or_path", adapter, "--max_seq_length", 64, "--learning_rate", "1e-2",
          "--lr_scheduler_type", "constant", "--world_size", 4, "--tensor_parallel_size", 2, "--gradient_accumulation_steps", 2,
          "--max_steps", 10, "--output_dir", output)
    reference = peft_losses(adapted, AutoTokenizer.from_pretrained(base), dataset, {})
    torch.testing.assert_close(losses(output), reference, rtol=0, atol=1e-4)

    merge = ("-m", "tools.merge_checkpoint")
    start(output / "checkpoint-10", output / "merged", program=merge)
    start(output / "checkpoint-10", output / "adapter", "--adapter_only", program=merge)
    ids = torch.arange(3, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter").eval()
    for (name, value), other in zip(adapted.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-3, msg=lambda text, at=name: f"{at}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(output / "merged").eos_token == "</s>"
    assert start(output / "checkpoint-10", output / "merged", program=merge, check=False).returncode == 1


def test_torchrun_from_elsewhere_with_the_tutorials_flags(tmp_path):
    """The launch command of the LoRA tutorial, on a machine of 8 virtual devices."""
    save_llama(tmp_path / "base", num_key_value_heads=8)
    hidden = ("PJRT_DEVICE", "CPU_NUM_DEVICES", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    flags = f"""--model_id {tmp_path}/base --dataset {ROOT}/data/sample/instructions.jsonl --num_train_epochs 3 --do_train
        --learning_rate 5e-5 --warmup_ratio 0.03 --max_steps 4 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 2 --gradient_checkpointing true --bf16 --zero_1 false --tensor_parallel_size 8
        --pipeline_parallel_size 1 --logging_steps 1 --save_total_limit 1 --output_dir {tmp_path}/out
        --lr_scheduler_type constant --lora_r 16 --lora_alpha 32 --lora_dropout 0.0
        --lora_target_modules q_proj,k_proj,v_proj,o_proj --max_seq_length 128 --packing true""".split()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8",
                           ROOT / "trainer" / "main.py", *flags],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = read(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["compilations"] == 2
    assert all(set(line) == {"step", "epoch", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens_per_second",
                             "step_seconds", "compilations"} for line in lines)
