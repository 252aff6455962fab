"""Weights are read slice by slice, hub ids are looked up, and random weights are Hugging Face's."""

import shutil

import pytest
import torch

from model.config import ModelConfig
from model.llama import Llama
from model.weights.hub import resolve
from model.weights.loading import check_weights, fill
from model.weights.safetensors_file import TensorFile
from model.weights.sources import RandomWeights, SafetensorsFiles
from parallel.mesh import Mesh
from parallel.shard import Shard, named_shards
from tests.support.models import save_llama
from trainer.prompts import PromptFormat, chat_ids
from trainer.tokenizer import load_tokenizer


def test_a_rank_reads_its_slices_and_nothing_else(tmp_path, monkeypatch):
    reference = save_llama(tmp_path).state_dict()
    counts = {}
    elements = TensorFile.elements

    def counted(file, name, first, count):
        counts[name] = counts.get(name, 0) + count
        return elements(file, name, first, count)

    monkeypatch.setattr(TensorFile, "elements", counted)
    config = ModelConfig.from_pretrained(tmp_path)
    whole = {name: torch.zeros(tensor.shape) for name, tensor in reference.items()}
    for rank in range(4):
        counts.clear()
        group = Mesh.create(rank, 4, 4).tp
        model = Llama(config, group)
        files = SafetensorsFiles(tmp_path)
        check_weights(config, files)
        assert not counts
        fill(model, files, "cpu", seed=0)
        assert counts == {
            name: tensor.numel() // (1 if "norm" in name else 4) for name, tensor in reference.items()
        }
        for name, parameter, shard in named_shards(model):
            whole[name][shard.slices] = parameter.detach()
    assert all(torch.equal(whole[name], tensor) for name, tensor in reference.items())


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        if name == "no/access":
            raise OSError("401 Client Error\nmore")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve(str(tmp_path)) == tmp_path and not asked
    assert resolve("meta-llama/Meta-Llama-3-8B") == tmp_path and asked == ["meta-llama/Meta-Llama-3-8B"]
    with pytest.raises(
        ValueError, match="--model_id no/access: no directory .* does not give it: 401 Client Error more$"
    ):
        resolve("no/access")
    with pytest.raises(ValueError, match="--adapter_name_or_path ./none: no such directory"):
        resolve("./none", "--adapter_name_or_path")


def test_chat_templates_of_a_hub_id_are_fetched(tmp_path, monkeypatch):
    """chat_template.jinja and additional_chat_templates/, with which the tokenizer then is as on the hub."""
    from huggingface_hub.utils import filter_repo_objects

    hub, cache = tmp_path / "hub", tmp_path / "cache"
    save_llama(hub)
    (hub / "additional_chat_templates").mkdir()
    unneeded = {"model.bin", "README.md", "consolidated.safetensors"}
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", *unneeded):
        (hub / name).write_text(f"{name}: {{{{ messages[0]['content'] }}}}")

    def snapshot_download(name, allow_patterns, ignore_patterns):
        files = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = load_tokenizer(resolve("owner/chat"))
    assert set(tokenizer.chat_template) == {"default", "rag"}
    messages = [{"role": "user", "content": "hello"}]
    assert PromptFormat.read(cache, tokenizer).chat
    assert tokenizer.decode(chat_ids(tokenizer, messages)) == "chat_template.jinja: hello"
    check_weights(ModelConfig.from_pretrained(cache), SafetensorsFiles(cache))
    assert not {path.name for path in cache.iterdir()} & unneeded


def test_random_weights_are_the_same_on_every_topology(tmp_path):
    save_llama(tmp_path, attention_bias=True)
    source = RandomWeights(ModelConfig.from_pretrained(tmp_path), seed=3)
    name, shape = "model.layers.0.mlp.down_proj.weight", (64, 96)
    everything = Shard(shape).slices
    whole = source.read(name, everything)
    assert torch.equal(
        torch.cat([source.read(name, Shard(shape, 1, 4, index).slices) for index in range(4)], 1), whole
    )
    assert abs(whole.mean()) < 0.01 and abs(whole.std() - 0.15) < 0.01
    assert not torch.equal(whole, source.read(name.replace("0", "1"), everything))
    assert not torch.equal(
        whole, RandomWeights(ModelConfig.from_pretrained(tmp_path), 4).read(name, everything)
    )
    assert (source.read("model.norm.weight", Shard((64,)).slices) == 1).all()
    assert not source.read("model.layers.0.self_attn.q_proj.bias", Shard((64,)).slices).any()
    scaled = RandomWeights(ModelConfig.from_pretrained(tmp_path), 3, depth_scaled=True)
    torch.testing.assert_close(scaled.read(name, everything), whole / (2 * 3) ** 0.5)  # three layers
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(scaled.read(other, Shard((96, 64)).slices), source.read(other, Shard((96, 64)).slices))
    assert scaled.fingerprint({}) != source.fingerprint({})
