"""Adapters in peft's format: our outputs are those of peft, on the CPU in one rank."""

import json

import pytest
import torch

from model.config import ModelConfig
from model.llama import Llama
from model.lora import add_lora, is_lora
from model.weights.loading import fill
from model.weights.peft import PeftAdapter
from model.weights.sources import SafetensorsFiles
from parallel.shard import named_shards
from tests.support.models import save_adapter, save_llama

ADAPTERS = {
    "names": (["q_proj", "v_proj", "down_proj"], {}),
    "rank-stabilised": (["q_proj"], {"use_rslora": True}),
    "a pattern": (r".*\.[02]\.(self_attn|mlp)\.(k|up)_proj", {}),
    "some layers": (["o_proj", "gate_proj"], {"layers_to_transform": [1]}),
    "all but one": (["q_proj"], {"exclude_modules": ["model.layers.1.self_attn.q_proj"]}),
    "the head": (["q_proj", "lm_head"], {}),
}


@pytest.mark.parametrize("targets, changes", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_are_those_of_peft(tmp_path, targets, changes):
    base, directory = tmp_path / "base", tmp_path / "adapter"
    adapted = save_adapter(save_llama(base), directory, targets, **changes)
    adapter = PeftAdapter(directory)
    model = Llama(ModelConfig.from_pretrained(base))
    add_lora(model, adapter.config)
    adapter.check({name: shard.global_shape for name, _, shard in named_shards(model) if is_lora(name)})
    fill(model, SafetensorsFiles(base), "cpu", 0, adapter.read)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = model(ids, torch.arange(57)[None], torch.ones(1, 57, dtype=torch.int64))
        torch.testing.assert_close(logits, adapted(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": None}, "r is None"),
        ({"target_modules": [3]}, r"target_modules is \[3\]"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, changes, problem):
    save_adapter(save_llama(tmp_path / "base"), tmp_path, ["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=problem):
        PeftAdapter(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(save_llama(tmp_path / "base", hidden_size=32), tmp_path, ["q_proj"])
    adapter = PeftAdapter(tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    expected = {f"{module}.lora_A.weight": (4, 64), f"{module}.lora_B.weight": (64, 4)}
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj.lora_A.weight is not part of the model \(and 3 more\)"
    ):
        adapter.check(expected)
