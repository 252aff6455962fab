"""Weights that can be read in two ways, or that are not finite, are refused; a stale copy is not read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.llama import Llama
from model.weights.loading import check_weights, fill
from model.weights.peft import PeftAdapter
from model.weights.sources import SafetensorsFiles
from parallel.shard import Shard, named_shards
from tests.support.models import save_adapter, save_llama

NAME = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def edit(directory, name, change):
    """`change(tensors)` of the file in which the index has `name`."""
    path = (
        directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def check(directory):
    """What a run checks of the model before it starts, and its weights."""
    config, files = ModelConfig.from_pretrained(directory), SafetensorsFiles(directory)
    check_weights(config, files)
    files.fingerprint(files.shapes)
    model = Llama(config)
    fill(model, files, "cpu", seed=0)
    return {name: parameter.detach() for name, parameter, _ in named_shards(model)}


def test_a_file_beside_an_index_is_refused(copy):
    save_file(check(copy), copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="has both model.safetensors and model.safetensors.index.json, which"
    ) as told:
        check(copy)
    assert str(copy) in str(told.value)
    expected = load_file(copy / "model.safetensors")
    for path in copy.glob("model-*"):
        path.unlink()
    (copy / "model.safetensors.index.json").unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in check(copy).items())


def test_an_index_may_list_that_file(copy):
    expected = check(copy)
    save_file(expected, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(expected, "model.safetensors")})
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in check(copy).items())


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_stale_copy_in_another_shard_is_not_read(copy, where):
    expected = check(copy)
    listed = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    other = sorted(set(listed.values()) - {listed[NAME]})[0 if where == "first" else -1]
    tensors = load_file(copy / other)
    tensors[NAME] = torch.ones(3, dtype=torch.int32)  # of another shape and type: never looked at
    save_file(tensors, copy / other, metadata={"format": "pt"})
    assert torch.equal(check(copy)[NAME], expected[NAME])
    edit(copy, NAME, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ValueError, match=f"lists {NAME} in {listed[NAME]}, which does not hold it"):
        check(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NAME, "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(copy, name, value):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    edit(copy, name, spoil)
    files = SafetensorsFiles(copy)
    with pytest.raises(ValueError, match=f"the weight {name} has values that are NaN or infinite"):
        files.fingerprint({name: files.shapes[name]})
    with pytest.raises(ValueError, match=f"the weight {name} has values that are NaN or infinite"):
        fill(Llama(ModelConfig.from_pretrained(copy)), files, "cpu", seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_weights_that_are_not_finite(tmp_path, dtype):
    tensors = {"a.weight": torch.ones(7, 3, dtype=dtype), "b.weight": torch.zeros(0, 3, dtype=dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    files.fingerprint(files.shapes)
    assert torch.equal(files.read_finite("a.weight", Shard((7, 3)).slices), tensors["a.weight"])
    tensors["a.weight"][4, 1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weight a.weight"):
        SafetensorsFiles(tmp_path).fingerprint(files.shapes)


def test_an_adapter_with_a_nan_is_refused(tmp_path):
    save_adapter(save_llama(tmp_path / "base"), tmp_path / "adapter", ["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    shapes = {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    PeftAdapter(tmp_path / "adapter").check(shapes)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lora_A.weight has values that are NaN"):
        PeftAdapter(tmp_path / "adapter").check(shapes)


def test_a_tied_head_is_the_embedding_or_refused(tmp_path):
    save_llama(tmp_path, tied=True)

    def add(tensors, change=lambda tensor: None):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        change(tensors[HEAD])

    edit(tmp_path, EMBEDDING, add)  # as older versions of transformers save it
    check(tmp_path)
    edit(tmp_path, EMBEDDING, lambda tensors: add(tensors, lambda tensor: tensor[-1, -1].add_(1e-3)))
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}, and the config ties them"):
        check(tmp_path)
    edit(tmp_path, EMBEDDING, lambda tensors: tensors.update({HEAD: tensors[HEAD][1:].clone()}))
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}"):
        check(tmp_path)
