"""A vocabulary that the ranks do not divide trains, answers and is saved as on ranks that divide it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.llama import Llama
from model.weights.loading import fill
from model.weights.sources import SafetensorsFiles
from parallel import loss
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.shard import Shard, named_shards
from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.runs import column, read, run_one
from tools.merge_checkpoint.merging import merge

VOCABULARY = 513  # the sample's 512 tokens, and one for padding: 129, 129, 129 and 126 on four ranks
FLAGS = [
    *("--max_seq_length", "64", "--global_batch_size", "4", "--max_steps", "4", "--save_steps", "2"),
    *("--learning_rate", "1e-2", "--weight_decay", "0.1", "--on_recompile", "error", "--do_eval"),
]
TOPOLOGIES = {
    "dp4": [],
    "tp4": ["--tensor_parallel_size", "4"],
    "zero": ["--tensor_parallel_size", "2", "--zero_1", "--gradient_checkpointing", "selective"],
    "stages": ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2"],
}
TRAININGS = {
    "full": ["--lora_r", "0", "--eval_samples", "2"],
    "tied": ["--lora_r", "0"],
    "head": ["--lora_target_modules", "q_proj,lm_head", "--lora_r", "4"],
}


def test_slices_of_any_size_are_the_whole():
    """Slices that are shorter, and empty ones: ten rows on 4, 7, 8 and 16 ranks."""
    whole = torch.arange(30.0).view(10, 3)
    for parts in (1, 2, 4, 7, 8, 16):
        shards = [Shard((10, 3), 0, parts, index) for index in range(parts)]
        assert torch.equal(torch.cat([whole[shard.slices] for shard in shards]), whole)
        assert {shard.local_shape for shard in shards} == {(-(-10 // parts), 3)}
        padded = torch.cat([shard.pad(whole[shard.slices]) for shard in shards])
        assert torch.equal(padded[:10], whole) and not padded[10:].any()
        assert sum(shard.numel for shard in shards) == 30


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_are_filled_with_zeros_behind_the_end(tmp_path, tied):
    reference = save_llama(tmp_path, tied=tied, vocab_size=VOCABULARY).state_dict()
    config, files = ModelConfig.from_pretrained(tmp_path), SafetensorsFiles(tmp_path)
    for stages, tp in ((1, 4), (1, 8), (3, 2)):
        found = {}
        for rank in range(stages * tp):
            mesh = Mesh.create(rank, stages * tp, tp, stages)
            model = Llama(config, mesh.tp, pipeline=Pipeline(mesh.pp, mesh.model))
            fill(model, files, "cpu", seed=0)
            for name, parameter, _ in named_shards(model):
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    assert len(parameter) == -(-VOCABULARY // (stages * tp))
                    found.setdefault(name, []).append(parameter.detach())
        assert len(found) == 1 + (not tied)
        for name, parts in found.items():
            padded = torch.cat(parts)
            assert torch.equal(padded[:VOCABULARY], reference[name]) and not padded[VOCABULARY:].any()


def all_runs(runtime, commands):
    """Of each command line, the largest number behind the end of a vocabulary that this rank has after it."""
    found = []
    for flags in commands:
        # But for what the others are compared with, the loss is computed by chunks of tokens.
        alone = flags[flags.index("--output_dir") + 1].endswith("dp4")
        loss.CHUNK_BYTES, loss.TILE = (64 * 2**20, 128) if alone else (4 * 16 * 129, 16)
        model = run_one(runtime, flags).model
        runtime.barrier()
        behind = [
            parameter.detach().cpu().flatten()[shard.numel :].abs()
            for _, parameter, shard in named_shards(model)
            if not shard.padding and parameter.numel() > shard.numel
        ]
        found.append([float(torch.cat([*behind, torch.zeros(1)]).max()), len(behind)])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of runs TRAINING-TOPOLOGY, and of one that began on four ranks and went on on others."""
    directory = tmp_path_factory.mktemp("padded")
    for training in TRAININGS:
        save_llama(directory / training, tied=training == "tied", vocab_size=VOCABULARY, num_hidden_layers=2)
    commands = [
        [
            *FLAGS,
            *("--model_id", str(directory / training), "--output_dir", str(directory / f"{training}-{name}")),
            *TRAININGS[training],
            *flags,
        ]
        for training in TRAININGS
        for name, flags in TOPOLOGIES.items()
    ]
    resumed = list(commands[list(TOPOLOGIES).index("stages")])
    resumed[resumed.index("--output_dir") + 1] = str(directory / "full-resumed")
    commands.append([*resumed, "--resume", str(directory / "full-zero" / "checkpoint-2")])
    found = on_ranks(all_runs, 4, commands=commands)
    assert all(largest == 0 for rank in found for largest, _ in rank)
    padded = [[count for _, count in rank] for rank in found]
    assert not any(padded[-1][0::4][:3]) and all(padded[-1][number] for number in (1, 3, 5, 7, 9))
    return directory


@pytest.mark.process
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", ["tp4", "zero", "stages"])
def test_losses_and_gradients_are_those_without_padding(runs, training, name):
    for figure in ("loss", "grad_norm"):
        ours, expected = (column(runs / f"{training}-{each}", figure) for each in (name, "dp4"))
        # Adam makes steps of roundings where a gradient is nearly 0.
        assert ours == pytest.approx(expected, rel=5e-5) and len(ours) == 4, figure
    ours, expected = (
        [line["eval_loss"] for line in read(runs / f"{training}-{each}", "eval.jsonl")]
        for each in (name, "dp4")
    )
    assert ours == pytest.approx(expected, rel=1e-5) and ours[0] > ours[-1]


@pytest.mark.process
@pytest.mark.parametrize("name", ["tp4", "zero", "stages"])
def test_answers_are_those_without_padding(runs, name):
    assert read(runs / f"full-{name}", "samples.jsonl") == read(runs / "full-dp4", "samples.jsonl")


@pytest.mark.process
@pytest.mark.parametrize("training", TRAININGS)
def test_what_is_saved_and_merged_has_no_padding(runs, training, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = {}
    for name in TOPOLOGIES:
        checkpoint = runs / f"{training}-{name}" / "checkpoint-4"
        tensors = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
        rows = [values["global_shape"][0] for key, values in tensors.items() if "lm_head.lora_B" in key]
        rows += [values["global_shape"][0] for key, values in tensors.items() if "embed_tokens" in key]
        assert rows and set(rows) == {VOCABULARY}
        merge(checkpoint, tmp_path / name, verify=True)
        merged[name] = load_file(tmp_path / name / "model.safetensors")
    for name, tensors in merged.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(
                tensor,
                merged["dp4"][key],
                rtol=0,
                atol=2e-3,
                msg=lambda text, at=f"{name} {key}": f"{at}: {text}",
            )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "zero").get_output_embeddings().weight.shape == (
        513,
        64,
    )


@pytest.mark.process
def test_a_run_goes_on_from_another_padding(runs):
    """From two tensor parallel ranks with ZeRO-1 to two stages of two ranks."""
    assert column(runs / "full-resumed") == pytest.approx(column(runs / "full-dp4")[2:], rel=2e-5)
