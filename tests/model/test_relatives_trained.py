"""Llama's relatives from peft's adapter through ten steps to a merged model, beside peft and transformers."""

import pytest
import torch

from tests.support.models import RELATIVES, peft_losses, save_adapter, save_model
from tests.support.on_ranks import on_ranks
from tests.support.runs import column, run_one, several_runs
from tools.merge_checkpoint.merging import merge
from trainer.config import parse
from trainer.job import prepare

pytestmark = pytest.mark.process

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS, NEW = [3, 40], 30  # of prompts and answers: past the windows of 24 positions
# (stages, tensor parallel ranks) and flags; the relatives take turns.
TOPOLOGIES = [
    ((2, 2), "--pipeline_parallel_size 2 --tensor_parallel_size 2 --num_microbatches 2"),
    ((1, 4), "--tensor_parallel_size 4 --gradient_checkpointing --zero_1"),
]


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]


def train_and_answer(runtime, commands, merged, topologies):
    """Train by each command line; the answers of each merged model, and how many graphs those took."""
    from pathlib import Path

    from model.generation import Generator, capacity_for
    from parallel.mesh import Mesh
    from parallel.pipeline import Pipeline
    from tools.model_source import ModelSource

    found = []
    for flags, directory, (stages, tp) in zip(commands, map(Path, merged), topologies, strict=True):
        run_one(runtime, flags)
        if runtime.rank == 0:
            merge(directory.parent / "out" / "checkpoint-10", directory)
        runtime.barrier()
        source, before = ModelSource.of_model(str(directory)), runtime.compilations()
        mesh = Mesh.create(runtime.rank, runtime.world_size, tp, stages)
        pipeline = Pipeline(mesh.pp, mesh.model)
        model = source.build(mesh.tp, runtime.device, torch.float32, pipeline=pipeline)
        runtime.mark_step()
        capacity = capacity_for(max(LENGTHS), NEW, source.config.max_positions)
        answers = Generator(runtime, model, mesh.tp, len(LENGTHS), capacity).generate(prompts(), NEW, set())
        found.append((answers, runtime.compilations() - before))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{relative: (its directory, the peft model, the flags, (answers, their compilations) of each rank)}."""
    made = {}
    for number, (name, (kind, changes)) in enumerate(RELATIVES.items()):
        directory = tmp_path_factory.mktemp("relative")
        adapted = save_adapter(save_model(directory / "base", kind, **changes), directory / "adapter", LINEAR)
        flags = f"""--model_id {directory}/base --adapter_name_or_path {directory}/adapter --max_seq_length 64
            --learning_rate 1e-2 --lr_scheduler_type constant --world_size 4 --per_device_train_batch_size 4
            --max_steps 10 --output_dir {directory}/out {TOPOLOGIES[number % 2][1]}""".split()
        made[name] = (directory, adapted, flags)
    ranks = on_ranks(
        train_and_answer,
        4,
        commands=[flags for *_, flags in made.values()],
        merged=[str(directory / "merged") for directory, *_ in made.values()],
        topologies=[TOPOLOGIES[number % 2][0] for number in range(len(made))],
    )
    return {
        name: (*each, answers)
        for (name, each), answers in zip(made.items(), zip(*ranks, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", RELATIVES)
def test_ten_steps_follow_peft_and_come_back_merged(trained, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, adapted, flags, ranks = trained[name]
    rows = prepare(parse([*flags, "--output_dir", f"{directory}/rows"]), 4).train_rows
    torch.testing.assert_close(column(directory / "out"), peft_losses(adapted, rows), rtol=0, atol=1e-4)
    assert len(set(column(directory / "out", "compilations"))) == 1  # none after the first step

    merged, loading = AutoModelForCausalLM.from_pretrained(directory / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(merged) is type(adapted.get_base_model())
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = adapted.eval()(ids).logits, merged.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * expected.abs().max().item())
    # What the ranks have trained, added to the base model by peft.
    merge(directory / "out" / "checkpoint-10", directory / "own", adapter_only=True)
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, directory / "own").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # The files themselves, to float32's precision: what ranks answer is what transformers does.
    for prompt, *answers in zip(prompts(), *(answers for answers, _ in ranks), strict=True):
        theirs = merged.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answers == [theirs[0, len(prompt) :].tolist()] * 4, name
    assert [compilations for _, compilations in ranks] == [2] * 4  # prefill of one bucket, and decoding


def test_all_weights_train_and_go_on_with_other_stages(tmp_path):
    """Biases, norms of heads and windows of some layers: six steps, of which the last three also on two
    stages, from a checkpoint of four ranks with ZeRO-1."""
    kind, changes = RELATIVES["qwen3 with windows"]
    save_model(tmp_path / "base", kind, **changes)
    flags = f"""--model_id {tmp_path}/base --lora_r 0 --max_seq_length 64 --learning_rate 1e-2 --max_steps 6
        --lr_scheduler_type constant --world_size 4 --per_device_train_batch_size 4""".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(
        several_runs,
        4,
        commands=[
            [
                *flags,
                "--tensor_parallel_size",
                "4",
                "--zero_1",
                "--save_steps",
                "3",
                "--output_dir",
                f"{whole}",
            ],
            [
                *flags,
                *TOPOLOGIES[0][1].split(),
                "--resume",
                f"{whole}/checkpoint-3",
                "--output_dir",
                f"{parts}",
            ],
        ],
    )
    losses = column(whole)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(column(parts), losses[3:], rtol=1e-4, atol=0)
    torch.testing.assert_close(column(parts, "grad_norm"), column(whole, "grad_norm")[3:], rtol=1e-4, atol=0)
