"""config.json as transformers 4 and 5 write it, and the fields that would make another model."""

import json

import pytest
import torch

from model.attention.rotary import rotary_frequencies
from model.config import ModelConfig
from model.config_fields import DEFAULTS, WITHOUT_EFFECT
from tests.support.models import LLAMA3

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 512,
}
SCALED = {
    "transformers 4": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "an older name": {
        "rope_theta": 500000.0,
        "rope_scaling": {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()},
    },
    "transformers 5": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "theta beside it": {"rope_theta": 500000, "rope_parameters": LLAMA3},
    "theta within rope_scaling": {"rope_scaling": LLAMA3 | {"rope_theta": 500000.0}},
    "both, which agree": {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "rope_parameters": LLAMA3 | {"rope_theta": 500000.0},
    },
}


def read(directory, **fields):
    (directory / "config.json").write_text(json.dumps(SIZES | fields))
    return ModelConfig.from_pretrained(directory)


@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
def test_both_forms_of_rope_give_metas_frequencies(tmp_path, rope):
    """Frequencies of theta 500000, which llama3's scaling stretches, by hand: 4 pairs of dimensions."""
    config = read(tmp_path, **rope)
    found = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    plain = [500000.0 ** -(pair / 4) for pair in range(4)]
    # Wave lengths 6.3 and 167 of the first two; above 64 / 1 all are divided by 8.
    torch.testing.assert_close(found, torch.tensor([plain[0], *(each / 8 for each in plain[1:])]))


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({}, 10000.0),
        ({"rope_scaling": None}, 10000.0),
        ({"rope_theta": 250000.0, "rope_scaling": {"rope_type": "default"}}, 250000.0),
        ({"rope_parameters": {"rope_theta": 250000.0, "rope_type": "default"}}, 250000.0),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 10000.0),
    ],
)
def test_theta_without_scaling(tmp_path, rope, theta):
    config = read(tmp_path, **rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, None)


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"attention_dropout": 0.1}, "attention_dropout is '0.1', which markstep does not compute"),
        ({"logit_softcapping": 30.0}, "logit_softcapping is"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings is"),
        ({"quantization": {"bits": 4}}, "quantization is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters of type 'yarn'"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters of type 'linear'"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters of type '3'"),
        ({"rope_parameters": LLAMA3 | {"type": "linear"}}, "of type 'linear or llama3'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "rope_parameters.factor is '8.0'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention is"),
        (
            {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; an object was expected"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0; more than"),
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta is 500000.0",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3},
            "rope_scaling is None and rope_parameters is {'factor': 8.0",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false was expected"),
        ({"mlp_bias": None}, "mlp_bias is None"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, fields, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        read(tmp_path, **fields)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


def test_every_field_that_transformers_writes_is_known(tmp_path):
    """All fields of its LlamaConfig, whichever version is installed, at its defaults."""
    from transformers import LlamaConfig

    settings = {name: value for name, value in LlamaConfig().to_dict().items() if name != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"bos_token_id": 7, "use_cache": False}))
    config = ModelConfig.from_pretrained(tmp_path)
    assert (config.rope_theta, config.rope_scaling, config.head_dim) == (10000.0, None, 128)
    for name, default in DEFAULTS.items():
        assert default in (None, settings[name]), name
    read(tmp_path, pretraining_tp=2, model_max_length=4096, unsloth_version="2026.1", rope_interleaved=False)
    assert not WITHOUT_EFFECT & set(DEFAULTS)
