"""The state of every rank after twenty steps of the real loop: replicas are equal to the bit, and ZeRO-1 and
the place of a mark_step change nothing."""

import pytest
import torch

from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.runs import column, final_states

pytestmark = pytest.mark.process

STEPS, TP, DP = 20, 4, 2
LORA, FULL = ["--lora_r", "4", "--lora_dropout", "0.1"], ["--lora_r", "0", "--weight_decay", "0.1"]
TWICE = ["--gradient_accumulation_steps", "2"]
RUNS = {
    "lora": [*LORA, *TWICE],
    "lora zero": [*LORA, *TWICE, "--zero_1"],
    "one graph": [*LORA, *TWICE, "--mark_step", "step"],
    "full": [*FULL, "--gradient_checkpointing"],
    "full zero": [*FULL, "--gradient_checkpointing", "--zero_1"],
    "bf16 zero": [*FULL, "--bf16", "--zero_1", "--sequence_parallel", "false"],
}


def look(optimizer):
    """The parameters with their shards, and the elements of each kind of optimizer state."""
    states = (optimizer.weights, optimizer.exp_avg, optimizer.exp_avg_sq)
    shards = optimizer.buckets.shards
    return (
        {
            name: (parameter.detach().cpu(), shards[name])
            for name, parameter in optimizer.buckets.parameters.items()
        },
        [sum(value.numel() for value in state) for state in states],
    )


def train(runtime, commands):
    return final_states(runtime, commands, look)


def test_replicas_are_equal_and_zero_1_changes_nothing(tmp_path):
    """At tp 4 with two KV heads, of which two ranks hold each."""
    save_llama(tmp_path / "base", num_hidden_layers=2, num_key_value_heads=2, mlp_bias=True)
    commands = [
        [
            "--model_id",
            f"{tmp_path}/base",
            "--max_seq_length",
            "64",
            "--learning_rate",
            "1e-3",
            "--max_steps",
            str(STEPS),
            "--tensor_parallel_size",
            str(TP),
            *flags,
            "--output_dir",
            f"{tmp_path}/{name}",
        ]
        for name, flags in RUNS.items()
    ]
    ranks = on_ranks(train, TP * DP, commands=commands)
    compiled = 0
    for name, flags in RUNS.items():
        losses = column(tmp_path / name)
        compiled += 2 if "--gradient_accumulation_steps" in flags and "--mark_step" not in flags else 1
        assert column(tmp_path / name, "compilations") == [compiled] * STEPS
        assert losses[-1] < losses[0]
        replicas = 0
        for parameter in ranks[0][name][0]:
            holders = {}
            for rank in ranks:
                value, shard = rank[name][0][parameter]
                holders.setdefault(str(shard.slices), []).append(value)
            for first, *others in holders.values():
                assert len(others) == DP * shard.replicas - 1
                assert all(torch.equal(first, other) for other in others), f"{name}: {parameter}"
            replicas += shard.replicas > 1
        assert replicas > 10

    torch.testing.assert_close(column(tmp_path / "one graph"), column(tmp_path / "lora"), rtol=1e-6, atol=0)
    for on, off in (("lora zero", "lora"), ("full zero", "full")):
        # Adam does not see the scale of the gradients; their norm does.
        torch.testing.assert_close(
            column(tmp_path / on, "grad_norm"), column(tmp_path / off, "grad_norm"), rtol=1e-5, atol=0
        )
        for rank in ranks:
            (parameters, state), (expected, whole) = rank[on], rank[off]
            for name, (value, _) in parameters.items():
                difference = (value - expected[name][0]).norm() / expected[name][0].norm()
                assert difference < 1e-5, (
                    f"{name}: {difference}"
                )  # one element with a gradient near 0 may make 4e-6
            assert len(state) == 3 and all(
                one <= all_of_it / DP + len(parameters) for one, all_of_it in zip(state, whole, strict=True)
            )
