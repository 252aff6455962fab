"""What merging writes, read by safetensors and transformers; and that neither memory nor a damaged byte gets
past it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.weights.safetensors_file import TensorWriter
from tests.support.models import save_adapter, save_llama
from tests.support.runs import start
from tests.support.saved import list_files, whole
from tests.tools.test_nxd_checkpoint import save_nxd
from tests.trainer.test_faults import save_tiny
from tools.merge_checkpoint.merging import merge, parse_size


def load_all(directory):
    return {
        name: tensor
        for file in Path(directory).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_files_sizes_and_types(tmp_path):
    checkpoint, shapes = save_tiny(tmp_path, 3)
    merge(checkpoint, tmp_path / "whole", dtype=torch.float32, verify=True)
    merge(checkpoint, tmp_path / "parts", dtype=torch.bfloat16, max_shard_size="100KB")
    for directory, dtype in (("whole", torch.float32), ("parts", torch.bfloat16)):
        found = load_all(tmp_path / directory)
        assert sorted(found) == sorted(shapes)
        assert all(torch.equal(found[name], whole("parameter", name, 3, shapes).to(dtype)) for name in shapes)
        assert json.loads((tmp_path / directory / "config.json").read_text())["torch_dtype"] == str(
            dtype
        ).removeprefix("torch.")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "parts").glob("*.safetensors")}
    assert (
        len(sizes) > 2
        and set(index["weight_map"].values()) == set(sizes)
        and set(index["weight_map"]) == set(shapes)
    )
    assert index["metadata"]["total_size"] == 2 * sum(
        torch.Size(shape).numel() for shape, _ in shapes.values()
    )
    largest = 2 * max(torch.Size(shape).numel() for shape, _ in shapes.values())
    assert all(size < max(100_000, largest) + 2000 for size in sizes.values())


def test_memory_holds_bands_and_no_tensor(tmp_path, monkeypatch):
    checkpoint, shapes = save_tiny(tmp_path, 3)
    monkeypatch.setattr("trainer.checkpoint.stored.BAND_BYTES", 4096)
    bands, write = [], TensorWriter.write
    monkeypatch.setattr(
        TensorWriter, "write", lambda *arguments: bands.append(arguments[2].nbytes) or write(*arguments)
    )
    merge(checkpoint, tmp_path / "merged", dtype=torch.float32)
    assert max(bands) <= 4096 and sum(bands) == 4 * sum(
        torch.Size(shape).numel() for shape, _ in shapes.values()
    )
    found = load_all(tmp_path / "merged")
    assert all(torch.equal(found[name], whole("parameter", name, 3, shapes)) for name in shapes)


def test_damage_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoint, _ = save_tiny(tmp_path, 3)
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    place = 8 + int.from_bytes(content[:8], "little") + 3000  # of a parameter: these come first
    file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    with pytest.raises(ValueError, match="rank-00001.safetensors is damaged: the bytes of parameter/"):
        merge(checkpoint, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    file.write_bytes(content)
    write = TensorWriter.write
    monkeypatch.setattr(
        TensorWriter, "write", lambda writer, name, band, first=0: write(writer, name, -band, first)
    )
    with pytest.raises(ValueError, match="is not what was written"):
        merge(checkpoint, tmp_path / "merged", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_other_programs_need_is_there(tmp_path):
    """Of a chat model: template, ends of answers, dtype, prompt format, and what its generation_config.json
    holds besides."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    checkpoint, _ = save_tiny(tmp_path, 3)
    settings = {"temperature": 0.6, "do_sample": True, "bos_token_id": 1, "eos_token_id": [2, 5]}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    (checkpoint / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}<pad>{% endfor %}"
    )
    list_files(checkpoint)
    merge(checkpoint, tmp_path / "merged", dtype=torch.bfloat16)
    generation = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (generation.temperature, generation.do_sample, generation.eos_token_id) == (0.6, True, [0, 2, 5])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template.startswith("{% for")
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "prompt_format.json",
    }
    (checkpoint / "generation_config.json").write_text("{")
    list_files(checkpoint)
    with pytest.raises(ValueError, match="generation_config.json is damaged"):
        merge(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"adapter_only": True}, "was trained without LoRA"),
        ({"base_only": True}, "was trained without LoRA"),
        ({"device": "nowhere"}, "--device nowhere cannot be used"),
        ({"max_shard_size": "5 elephants"}, "a size such as 5GB"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, problem):
    checkpoint, _ = save_tiny(tmp_path, 3)
    with pytest.raises(ValueError, match=problem):
        merge(checkpoint, tmp_path / "merged", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "2GiB", "300")] == [
        5 * 10**9,
        1_500_000,
        2 * 2**30,
        300,
    ]


@pytest.mark.process
def test_an_adapter_goes_in_and_out_without_loss(tmp_path, monkeypatch):
    """A peft adapter, read by 4 ranks, trained with a rate of 0, and written again; the base that it was on;
    and both in one."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    adapted = save_adapter(save_llama(base), adapter, ["q_proj", "v_proj", "down_proj"])
    start(
        "--model_id",
        base,
        "--adapter_name_or_path",
        adapter,
        "--learning_rate",
        0,
        "--max_steps",
        1,
        "--world_size",
        4,
        "--tensor_parallel_size",
        2,
        "--zero_1",
        "--max_seq_length",
        64,
        "--output_dir",
        output,
    )
    merge(output / "checkpoint-1", tmp_path / "adapter_again", adapter_only=True)
    merge(output / "checkpoint-1", tmp_path / "base_again", base_only=True)
    for again, original in (("adapter_again", adapter), ("base_again", base)):
        found, expected = load_all(tmp_path / again), load_all(original)
        assert sorted(found) == sorted(expected) and all(
            torch.equal(found[name], expected[name]) for name in found
        )
    monkeypatch.setattr("tools.merge_checkpoint.sources.BAND_BYTES", 4096)  # several bands a matrix
    merge(output / "checkpoint-1", tmp_path / "merged", verify=True)
    found, expected = load_all(tmp_path / "merged"), adapted.merge_and_unload().state_dict()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_a_checkpoint_of_neuronx_distributed(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_llama(tmp_path / "base")
    state, config = model.state_dict(), ModelConfig.from_pretrained(tmp_path / "base")
    save_nxd(tmp_path / "nxd", config, state, tp=8, pp=2)
    with pytest.raises(ValueError, match="is a checkpoint of neuronx-distributed: pass --model_id"):
        merge(tmp_path / "nxd", tmp_path / "merged")
    merge(tmp_path / "nxd", tmp_path / "merged", model_id=str(tmp_path / "base"), verify=True)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits,
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(ids).logits,
        )
