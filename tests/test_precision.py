"""bf16 with fp32 master weights against fp32."""
import json
import math

import torch

from tests.on_ranks import on_ranks
from tests.test_training import column, several_runs
from trainer.config import SAMPLE

PRECISIONS = {"fp32": [], "bf16": ["--bf16"], "nearest": ["--bf16", "--stochastic_rounding"]}


def test_bf16_with_master_weights_follows_fp32(tmp_path):
    """50 steps; the tolerance is what rounding alone does to the loss. Without master weights, a CPU loses most updates.

    A rounding to bf16 is off by at most u = 2^-8 relative, at random: n in a row by sqrt(n) u. Between embedding and logits there
    are about 16 a layer (norm, q, k, rotation, weights, values, output, residual, ...) and 4 more, so logits of deviation s are
    off by sqrt(n) u s, and the loss, a difference of two of them, by sqrt(2 n) u s. Random logits of deviation s have the loss
    ln V + s^2 / 2, which gives s.
    """
    flags = ["--max_seq_length", "64", "--lora_r", "0", "--per_device_train_batch_size", "8", "--learning_rate", "1e-4",
             "--lr_scheduler_type", "constant", "--max_steps", "50", "--tensor_parallel_size", "2"]
    outputs = {name: tmp_path / name for name in PRECISIONS}
    on_ranks(several_runs, 2, commands=[[*flags, *PRECISIONS[name], "--output_dir", f"{outputs[name]}"] for name in PRECISIONS])
    loss = {name: torch.tensor(column(output), dtype=torch.float64) for name, output in outputs.items()}
    config = json.loads((SAMPLE / "tiny" / "config.json").read_text())
    deviation = math.sqrt(2 * (loss["fp32"][0].item() - math.log(config["vocab_size"])))
    tolerance = math.sqrt(2 * (16 * config["num_hidden_layers"] + 4)) * 2**-8 * deviation
    assert len(loss["fp32"]) == 50 and loss["fp32"][0] - loss["fp32"][-8:].mean() > 15 * tolerance
    assert 0 < (loss["bf16"] - loss["fp32"]).abs().max() < tolerance
    assert (loss["nearest"] - loss["fp32"])[-8:].mean() > 10 * tolerance
