"""bf16 with fp32 master weights against fp32."""

import json
import math

import pytest
import torch

from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.runs import column, final_states, several_runs
from trainer.config import parse
from trainer.config_derived import SAMPLE
from trainer.job import prepare

pytestmark = pytest.mark.process

PRECISIONS = {"fp32": [], "bf16": ["--bf16"], "nearest": ["--bf16", "--stochastic_rounding"]}


def test_bf16_with_master_weights_follows_fp32(tmp_path):
    """50 steps; the tolerance is what rounding alone does to the loss. Without master weights, a CPU loses
    most updates.

    A rounding to bf16 is off by at most u = 2^-8 relative, at random: n in a row by sqrt(n) u. Between
    embedding and logits there are about 16 a layer (norm, q, k, rotation, weights, values, output, residual,
    ...) and 4 more, so logits of deviation s are off by sqrt(n) u s, and the loss, a difference of two of
    them, by sqrt(2 n) u s. Random logits of deviation s have the loss ln V + s^2 / 2, which gives s.
    """
    flags = [
        "--max_seq_length",
        "64",
        "--lora_r",
        "0",
        "--per_device_train_batch_size",
        "8",
        "--learning_rate",
        "1e-4",
        "--lr_scheduler_type",
        "constant",
        "--max_steps",
        "50",
        "--tensor_parallel_size",
        "2",
    ]
    outputs = {name: tmp_path / name for name in PRECISIONS}
    on_ranks(
        several_runs,
        2,
        commands=[[*flags, *PRECISIONS[name], "--output_dir", f"{outputs[name]}"] for name in PRECISIONS],
    )
    loss = {name: torch.tensor(column(output), dtype=torch.float64) for name, output in outputs.items()}
    config = json.loads((SAMPLE / "tiny" / "config.json").read_text())
    deviation = math.sqrt(2 * (loss["fp32"][0].item() - math.log(config["vocab_size"])))
    tolerance = math.sqrt(2 * (16 * config["num_hidden_layers"] + 4)) * 2**-8 * deviation
    assert len(loss["fp32"]) == 50 and loss["fp32"][0] - loss["fp32"][-8:].mean() > 15 * tolerance
    assert 0 < (loss["bf16"] - loss["fp32"]).abs().max() < tolerance
    assert (loss["nearest"] - loss["fp32"])[-8:].mean() > 10 * tolerance


def look(optimizer):
    """The gradients that the optimizer got in the first step, which are its first moment / (1 - beta1)."""
    state = [value.cpu() / 0.1 for value in optimizer.exp_avg]
    return {
        name: (*optimizer.buckets.own_piece(name, state), shard)
        for name, shard in optimizer.buckets.shards.items()
    }


def first_gradients(runtime, commands):
    return final_states(runtime, commands, look)


def whole_gradients(ranks, run):
    """Put together what each rank has of each, in float64."""
    whole = {}
    for rank in ranks:
        for name, (elements, first, shard) in rank[run].items():
            gradient = whole.setdefault(name, torch.full(shard.global_shape, torch.nan, dtype=torch.float64))
            part = gradient[shard.slices].flatten()
            part[first : first + len(elements)] = elements.double()
            gradient[shard.slices] = part.view(shard.shape)
    return whole


def dense_bf16_norm(base, flags):
    """clip_grad_norm_ of transformers' model in bf16 on the rows of the first step, each example alone."""
    from transformers import AutoModelForCausalLM

    from data.loader import Loader

    model = AutoModelForCausalLM.from_pretrained(
        base, torch_dtype=torch.bfloat16, attn_implementation="eager"
    )
    loader = Loader(
        prepare(parse(flags), 4).train_rows, batch_size=4, accumulation=1, dp_rank=0, dp_size=1, seed=42
    )
    (batch,) = loader.step(0)
    tokens = int((batch["labels"] != -100).sum())
    for row in range(4):
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            where = batch["segment_ids"][row] == segment
            logits = model(input_ids=batch["input_ids"][row, where][None]).logits[0].float()
            (
                torch.nn.functional.cross_entropy(logits, batch["labels"][row, where], reduction="sum")
                / tokens
            ).backward()
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True).item()


def test_the_norm_in_bf16_is_that_of_the_whole_gradient(tmp_path):
    """With ZeRO-1 and replicated KV heads too; and near that of the dense bf16 model, whose gradients round
    otherwise."""
    save_llama(tmp_path / "base", num_hidden_layers=2, num_key_value_heads=1)
    flags = [
        "--model_id",
        f"{tmp_path}/base",
        "--max_seq_length",
        "64",
        "--bf16",
        "--lora_r",
        "0",
        "--max_steps",
        "1",
        "--tensor_parallel_size",
        "2",
        "--per_device_train_batch_size",
        "2",
    ]
    runs = {
        "free": ["--max_grad_norm", "0"],
        "clipped": ["--max_grad_norm", "0.5"],
        "zero": ["--max_grad_norm", "0.5", "--zero_1", "--sequence_parallel", "false"],
    }
    ranks = on_ranks(
        first_gradients,
        4,
        commands=[[*flags, *more, "--output_dir", f"{tmp_path}/{name}"] for name, more in runs.items()],
    )
    expected = dense_bf16_norm(tmp_path / "base", [*flags, "--output_dir", f"{tmp_path}/dense"])
    for name in runs:
        (norm,) = column(tmp_path / name, "grad_norm")
        assert abs(norm - expected) < 2**-7 * expected
        gradients = [torch.nn.Parameter(value) for value in whole_gradients(ranks, name).values()]
        for gradient in gradients:
            gradient.grad = gradient.detach()
        found = torch.nn.utils.clip_grad_norm_(gradients, 1e9, error_if_nonfinite=True).item()
        assert norm > 0.6 and abs(found - (norm if name == "free" else 0.5)) < 1e-5 * norm
