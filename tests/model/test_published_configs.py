"""config.json files as they were published with models: some are trained, others refused."""

import json
import math

import pytest

from model.config import ModelConfig

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "torch_dtype": "bfloat16"}
COMMON = TOKENS | {"hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.51.0"}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GRANITE = COMMON | {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_multiplier": 12.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49159,
}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
# Name -> (the file, what of the ModelConfig is not Llama's, and its number of parameters in billions)
TRAINED = {
    "meta-llama/Llama-3.2-1B": (
        LLAMA
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}},
        1.236,
    ),
    "mistralai/Mistral-7B-v0.1": (
        MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        {"windows": (4096,) * 32},
        7.242,
    ),
    "mistralai/Mistral-7B-v0.3": (
        MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        {},
        7.248,
    ),
    "Qwen/Qwen2.5-0.5B": (
        QWEN2
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        {"qkv_bias": True},
        0.494,
    ),
    "Qwen/Qwen2.5-7B": (
        QWEN2
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        {"qkv_bias": True},
        7.616,
    ),
    "Qwen/Qwen3-0.6B": (
        QWEN3
        | {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "tie_word_embeddings": True,
        },
        {"qk_norm": True},
        0.596,
    ),
    "Qwen/Qwen3-8B": (
        QWEN3
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "tie_word_embeddings": False,
        },
        {"qk_norm": True},
        8.191,
    ),
    "ibm-granite/granite-3.3-2b-instruct": (
        GRANITE
        | {
            "attention_multiplier": 0.015625,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "logits_scaling": 8.0,
        },
        MULTIPLIERS | {"attention_multiplier": 0.015625, "logits_scaling": 8.0},
        2.534,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        GRANITE
        | {
            "attention_multiplier": 0.0078125,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "logits_scaling": 16.0,
        },
        MULTIPLIERS | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0},
        8.171,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        COMMON
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        {"rotary_layers": (True, True, True, False) * 9},
        3.075,
    ),
}
PLAIN = {
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "qkv_bias": False,
    "qk_norm": False,
    "windows": (),
    "rotary_layers": (),
    "rope_scaling": None,
}
# What says of which kind the model is, and what the error says.
REFUSED = {
    "google/gemma-3-4b-it": ("gemma3", {"text_config": {}}, "its norms' weights, which are added to one"),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {"num_local_experts": 8}, "its mixture of experts"),
    "microsoft/Phi-3-mini-4k-instruct": (
        "phi3",
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "sliding_window": 2047},
        "its projections, which are stored as one weight",
    ),
    "deepseek-ai/DeepSeek-V3": (
        "deepseek_v3",
        {"kv_lora_rank": 512, "n_routed_experts": 256},
        "its latent attention and mixture of experts",
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss",
        {"num_local_experts": 32},
        "its mixture of experts and attention sinks",
    ),
}


def read(directory, settings):
    (directory / "config.json").write_text(json.dumps(settings))
    return ModelConfig.from_pretrained(directory)


def v5(settings):
    """The same file as transformers 5 writes it."""
    settings = dict(settings)
    rope = settings.pop("rope_scaling", None) or {"rope_type": "default"}
    settings["dtype"] = settings.pop("torch_dtype")
    return settings | {"rope_parameters": rope | {"rope_theta": settings.pop("rope_theta")}}


@pytest.mark.parametrize("name", TRAINED)
def test_a_published_file_is_read(tmp_path, name):
    from model.weights.shapes import base_shapes

    settings, differences, billions = TRAINED[name]
    config = read(tmp_path, settings)
    assert config == read(tmp_path, v5(settings)) == read(tmp_path, config.settings())
    assert {field: getattr(config, field) for field in PLAIN} == PLAIN | differences
    for field in set(vars(config)) & set(settings) - {"rope_scaling"}:
        assert getattr(config, field) == settings[field], field
    parameters = sum(math.prod(shape) for shape in base_shapes(config).values())
    assert round(parameters / 1e9, 3) == billions


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_with_what_is_not_computed(tmp_path, name):
    kind, settings, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"markstep does not compute {reason}") as caught:
        read(tmp_path, COMMON | settings | {"model_type": kind})
    assert "it trains LlamaForCausalLM, MistralForCausalLM" in str(caught.value)
    assert "\n" not in str(caught.value)
