"""config.json as transformers 4 and 5 write it, and the fields that would make another model."""

import json

import pytest
import torch

from model.attention.rotary import rotary_cos_sin, rotary_frequencies
from model.config import ARCHITECTURES, ModelConfig
from model.config_fields import DEFAULTS, WITHOUT_EFFECT
from model.config_layers import BY_LAYER
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
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 64,
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
    found, factor = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    assert factor == 1
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
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_parameters of type 'dynamic', whose frequencies change with the longest row of a batch; ",
        ),
        ({"rope_parameters": {"type": "linear"}}, "rope_parameters.factor is None; scaling of type 'linear'"),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, "beta_fast is 0.5; more than the beta_slow 1"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate is 1; true or false"),
        ({"rope_parameters": YARN | {"low_freq_factor": 1.0}}, "rope_parameters.low_freq_factor is '1.0'"),
        ({"rope_scaling": LONGROPE}, "and rope_scaling.original_max_position_embeddings is 64: which"),
        (
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
            "original_max_position_embeddings is 32 and rope_parameters.original_max_position_embeddings is",
        ),
        (
            {"rope_scaling": LONGROPE | {"factor": 3.0}, "original_max_position_embeddings": 64},
            "rope_scaling.factor is 3.0 and max_position",
        ),
        ({"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, "a list of 4 numbers .head_dim / 2. was"),
        (
            {"rope_parameters": LONGROPE | {"short_factor": [1.0, 0, 1, 1]}},
            r"short_factor\[1\] is 0; a number",
        ),
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
            "rope_scaling is None and rope_parameters is {'rope_type': 'llama3', 'factor': 8.0",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false was expected"),
        ({"mlp_bias": None}, "mlp_bias is None"),
        ({"model_type": "mistral"}, r"the architecture is \['LlamaForCausalLM'\]; of model_type 'mistral'"),
        ({"sliding_window": 4096}, "sliding_window is '4096', which markstep does not compute"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, fields, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        read(tmp_path, **fields)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_field_that_transformers_writes_is_known(tmp_path, kind):
    """All fields of its config class, whichever version is installed, at its defaults; a file without fields
    has the same."""
    from transformers import AutoConfig

    row = ARCHITECTURES[kind]
    settings = AutoConfig.for_model(kind).to_dict() | {"architectures": [row.class_name]}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"bos_token_id": 7, "use_cache": False}))
    config = ModelConfig.from_pretrained(tmp_path)
    assert config == ModelConfig.from_settings({"model_type": kind})
    assert config.rope_theta == row.defaults.get("rope_theta", 10000.0) and config.rope_scaling is None
    for name, default in (DEFAULTS | row.defaults).items():
        if name not in ("rope_theta", *BY_LAYER):  # which it completes
            assert default is None or default == settings[name], name
    assert not WITHOUT_EFFECT & set(DEFAULTS | row.defaults)


def test_what_only_tools_write_changes_nothing(tmp_path):
    read(tmp_path, pretraining_tp=2, model_max_length=4096, unsloth_version="2026.1", rope_interleaved=False)


QWEN = {"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 16}
SMOL = {"model_type": "smollm3", "num_hidden_layers": 3}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "settings, windows, rotary",
    [
        ({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 16}, (16, 16), ()),
        ({"model_type": "mistral", "num_hidden_layers": 2}, (4096, 4096), ()),  # MistralConfig's
        ({"model_type": "mistral", "sliding_window": None}, (), ()),
        (QWEN, (), ()),
        (QWEN | {"use_sliding_window": True}, (), ()),  # from layer 28 on
        (QWEN | {"use_sliding_window": True, "max_window_layers": 1}, (0, 16, 16), ()),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 0}, (16, 16, 16), ()),
        (QWEN | {"use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]}, (16, 0, 16), ()),
        (QWEN | {"layer_types": [FULL, FULL, FULL]}, (), ()),
        (SMOL, (), ()),  # the fourth would be the first without
        (SMOL | {"no_rope_layer_interval": 2}, (), (True, False, True)),
        (SMOL | {"no_rope_layers": [0, 1, 1]}, (), (False, True, True)),
        (
            SMOL | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 16},
            (16, 0, 0),
            (False, True, True),
        ),
    ],
)
def test_layers_differ_as_in_transformers(settings, windows, rotary):
    from transformers import AutoConfig

    config = ModelConfig.from_settings(settings)
    assert (config.windows, config.rotary_layers) == (windows, rotary)
    theirs = AutoConfig.for_model(**settings)
    if settings["model_type"] != "mistral":
        types = [SLIDING if window else FULL for window in windows or [0] * config.num_hidden_layers]
        assert theirs.layer_types == types
    assert [bool(each) for each in getattr(theirs, "no_rope_layers", rotary)] == list(
        rotary or [True] * len(getattr(theirs, "no_rope_layers", ()))
    )


@pytest.mark.parametrize(
    "settings, problem",
    [
        (QWEN | {"layer_types": [SLIDING] * 3}, "but the window is off .use_sliding_window False, sliding_w"),
        (QWEN | {"layer_types": [FULL]}, "a list of 3 .num_hidden_layers. of 'full_attention' and 'slid"),
        (QWEN | {"layer_types": [FULL, FULL, "chunked_attention"]}, "layer_types is .'full_attention'"),
        (QWEN | {"use_sliding_window": 1}, "use_sliding_window is 1; true or false"),
        (QWEN | {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0; an integer"),
        (QWEN | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        (QWEN | {"attention_multiplier": 0.5}, "attention_multiplier is '0.5', which markstep does not"),
        (SMOL | {"no_rope_layers": [1, 0]}, "no_rope_layers is .1, 0.; a list of 3"),
        (SMOL | {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0; a number above 0"),
        ({"model_type": "granite", "attention_multiplier": "1"}, "attention_multiplier is '1'"),
        ({"model_type": "granite", "attention_dropout": 0.1}, "attention_dropout is '0.1'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is 'True'"),
        ({"model_type": "mistral", "layer_types": [SLIDING] * 32}, "layer_types is"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias is 'True'"),
    ],
)
def test_a_relatives_field_that_cannot_be_read_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig.from_settings(settings)


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn, its own length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, factor": YARN | {"attention_factor": 1.5, "truncate": False},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "longrope, factor": {key: value for key, value in LONGROPE.items() if "original" not in key}
    | {"factor": 8.0},
    "longrope, attention_factor": LONGROPE | {"attention_factor": 1.5},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(tmp_path, name):
    """cos and sin of all positions of a row, to float32's precision."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling, fields = dict(SCALINGS[name]), {"max_position_embeddings": 256, "rope_theta": 500000.0}
    if scaling["rope_type"] == "longrope" and "original_max_position_embeddings" in scaling:
        fields["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    config = read(tmp_path, rope_scaling=scaling, **fields)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**SIZES | fields, rope_scaling=dict(scaling)))
    positions = torch.arange(config.max_positions)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    frequencies, factor = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    own_cos, own_sin = rotary_cos_sin(positions.t(), frequencies, factor)
    torch.testing.assert_close(own_cos[:, :, 0].transpose(0, 1), cos, rtol=0, atol=3e-5)
    torch.testing.assert_close(own_sin[:, :, 0, 4:].transpose(0, 1), sin[..., 4:], rtol=0, atol=3e-5)
    assert config.max_positions == (64 if name in ("longrope", "longrope, attention_factor") else 256)
    assert config == ModelConfig.from_settings(config.settings())
