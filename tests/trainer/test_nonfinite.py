"""Steps whose loss or gradient norm is not finite: where they began, what they change, what is saved."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.runs import read, run_one
from trainer.checkpoint.names import KINDS, NonFinite, list_checkpoints
from trainer.checkpoint.reader import Checkpoint

BAD_WORD, RECORDS, BAD_RECORD = "@", 8, 5
SHORT = "--packing false --max_seq_length 32 --learning_rate 1e-3 --save_steps 1"
TOPOLOGIES = {
    "zero_1": "--tensor_parallel_size 2 --lora_r 0 --zero_1",
    "replicas": "--tensor_parallel_size 2 --lora_r 4 --bf16 --gradient_checkpointing",
    "accumulation": "--tensor_parallel_size 2 --lora_r 0 --zero_1 --gradient_accumulation_steps 2",
    "one_graph": "--tensor_parallel_size 4 --lora_r 4 --gradient_accumulation_steps 2 --mark_step step "
    "--replay false",
    "stages": "--tensor_parallel_size 2 --pipeline_parallel_size 2 --per_device_train_batch_size 2 "
    "--lora_r 4",
    "stages_in_one_graph": "--pipeline_parallel_size 2 --per_device_train_batch_size 2 --lora_r 0 --zero_1 "
    "--mark_step step",
}


def command(directory, name, *flags, model="base"):
    return [
        *TOPOLOGIES[name].split(),
        "--model_id",
        str(directory / model),
        "--dataset",
        str(directory / "data.jsonl"),
        *SHORT.split(),
        *map(str, flags),
    ]


def ends_of(runtime, commands, poison=None):
    """Run the commands; how each ended on this rank. The embedding of the token `poison` is infinite."""
    from parallel.layers import ParallelEmbedding

    if poison is not None:
        plain = getattr(ParallelEmbedding, "plain", ParallelEmbedding.forward)

        def forward(self, ids):
            rows = plain(self, ids)
            if self.sequence_parallel_enabled:
                return rows * torch.where((ids == poison).any(), math.inf, 1.0)
            return torch.where((ids == poison).unsqueeze(-1), math.inf, rows)

        ParallelEmbedding.plain, ParallelEmbedding.forward = plain, forward
    ends = []
    for flags in commands:
        try:
            run_one(runtime, flags)
            ends.append("")
        except NonFinite as error:
            ends.append(str(error))
    return ends


def equal(one, other):
    """Whether two checkpoints have the same weights and moments, to the bit."""
    one, other = Checkpoint(one), Checkpoint(other)
    return all(
        torch.equal(one.read(kind, name), other.read(kind, name)) for kind in KINDS for name in one.shapes
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of three layers, and records of which one has the bad word."""
    from trainer.job import load_tokenizer

    directory = tmp_path_factory.mktemp("inputs")
    save_llama(directory / "base")
    records = [{"text": f"A record, {'and ' * number}no more."} for number in range(RECORDS)]
    records[BAD_RECORD] = {"text": f"A record with an {BAD_WORD} in it."}
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ids = load_tokenizer(directory / "base")(BAD_WORD, add_special_tokens=False)["input_ids"]
    return directory, ids[-1]


@pytest.mark.process
def test_a_bad_step_changes_nothing(inputs, tmp_path):
    """`skip` goes on after it, `end` says where it began; and what was saved is good."""
    (directory, poison), steps = inputs, 6
    commands = [
        command(
            directory,
            name,
            "--on_nonfinite",
            how,
            "--max_steps",
            steps,
            "--output_dir",
            tmp_path / f"{name}-{how}",
        )
        for name in TOPOLOGIES
        for how in ("skip", "end")
    ]
    ends = on_ranks(ends_of, 4, commands=commands, poison=poison)
    assert all(each == ends[0] for each in ends)
    for name, (skipped, ended) in zip(TOPOLOGIES, zip(ends[0][::2], ends[0][1::2], strict=True), strict=True):
        lines = read(tmp_path / f"{name}-skip")
        bad = [line["step"] for line in lines if line["grad_norm"] is None]
        assert skipped == "" and len(lines) == steps, name
        epochs = [math.ceil(line["epoch"]) for line in lines]  # each has one bad step
        assert [epochs[step - 1] for step in bad] == sorted(set(epochs))[: len(bad)] and bad, f"{name}: {bad}"
        assert [line["step"] for line in lines if line["loss"] is None] == bad
        paths = dict(list_checkpoints(tmp_path / f"{name}-skip"))
        for step in range(2, steps + 1):
            Checkpoint(paths[step]).verify()
            assert equal(paths[step - 1], paths[step]) == (step in bad), f"{name}: {step}"
        first = bad[0]
        assert f"step {first} is not finite: loss nan, gradient norm nan. It began in the forward" in ended, (
            name
        )
        assert "the output of model.embed_tokens. Nothing was saved of this step" in ended
        assert [step for step, _ in list_checkpoints(tmp_path / f"{name}-end")] == list(range(1, first))
        assert [line["step"] for line in read(tmp_path / f"{name}-end")] == list(range(1, first + 1))


def spoil(directory, name, changes):
    """A model `name`, a copy of the base model with other values of some weights: {name: value}."""
    tensors = {}
    for file in directory.glob("base/*.safetensors"):
        tensors |= load_file(file)
    for weight, value in changes.items():
        tensors[weight] = torch.full_like(tensors[weight], value)
    (target := directory / name).mkdir()
    for file in directory.glob("base/*.json"):
        if file.name != "model.safetensors.index.json":
            (target / file.name).write_text(file.read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.process
def test_the_layer_where_it_began(inputs, tmp_path):
    """Weights so large that a product overflows: in the forward; in the backward alone; or only the norm."""
    directory, _ = inputs
    value, output = (f"model.layers.2.self_attn.{name}.weight" for name in ("v_proj", "o_proj"))
    origins = {
        spoil(
            directory, "forward", {"model.layers.2.mlp.down_proj.weight": 3e38}
        ): "micro-batch 1: the output of model.layers.2.mlp.down_proj.",
        spoil(
            directory, "backward", {value: 1e-38, output: 3e38}
        ): "the backward: the gradients of model.layers.2.",
        spoil(directory, "norm", {value: 1e-30, output: 1e27}): "their sum overflows",
    }
    names = ("zero_1", "stages", "stages_in_one_graph", "one_graph")
    commands = [
        command(directory, name, "--max_steps", 2, "--output_dir", tmp_path / f"{name}-{model}", model=model)
        for model in origins
        for name in names
    ]
    ends = on_ranks(ends_of, 4, commands=commands)
    assert all(each == ends[0] for each in ends)
    for flags, end in zip(commands, ends[0], strict=True):
        model = flags[flags.index("--model_id") + 1].split("/")[-1]
        assert "step 1 is not finite: loss" in end and origins[model] in end, (flags, end)
        assert "there is no checkpoint yet" in end
