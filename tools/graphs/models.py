"""Models by name, for tools that need a configuration and no weights."""

from pathlib import Path

from model.config import ModelConfig
from model.llama import Llama
from parallel.mesh import Mesh
from trainer.build import build_model
from trainer.config import Config
from trainer.config_derived import SAMPLE
from trainer.lora_settings import lora_config

LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA3_8B = LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31_8B = LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE}
LLAMA32 = LLAMA31_8B | {"tie_word_embeddings": True, "rope_scaling": LLAMA31_ROPE | {"factor": 32.0}}
# What the config.json that was published with each model says; the rest are its class's defaults.
PRESETS = {
    "llama2-7b": LLAMA2_7B,  # meta-llama/Llama-2-7b-hf
    "llama3-8b": LLAMA3_8B,  # meta-llama/Meta-Llama-3-8B
    "llama3.1-8b": LLAMA31_8B,  # meta-llama/Llama-3.1-8B
    "llama3.2-1b": LLAMA32  # meta-llama/Llama-3.2-1B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "llama3.2-3b": LLAMA32  # meta-llama/Llama-3.2-3B
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
    "llama3-70b": LLAMA3_8B  # meta-llama/Meta-Llama-3-70B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "mistral-7b-v0.3": {  # mistralai/Mistral-7B-v0.3; its window, which v0.1 had, is off
        "model_type": "mistral",
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen2.5-7b": {  # Qwen/Qwen2.5-7B
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
    },
    "qwen3-8b": {  # Qwen/Qwen3-8B
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "granite-3.3-8b": {  # ibm-granite/granite-3.3-8b-instruct
        "model_type": "granite",
        "vocab_size": 49159,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 16.0,
    },
    "smollm3-3b": {  # HuggingFaceTB/SmolLM3-3B
        "model_type": "smollm3",
        "max_position_embeddings": 65536,
        "rope_theta": 5000000.0,
    },
}


def read_model(name: str) -> ModelConfig:
    """The ModelConfig of a preset, of `tiny`, of a directory or of a config.json.

    Raises ValueError for any other name.
    """
    if name in PRESETS:
        return ModelConfig.from_settings(PRESETS[name])
    path = SAMPLE / "tiny" if name == "tiny" else Path(name)
    if not path.exists() or path.is_file() and path.name != "config.json":
        raise ValueError(
            f"--model {name}: {', '.join(PRESETS)}, tiny, a directory or a config.json was expected"
        )
    return ModelConfig.from_pretrained(path.parent if path.is_file() else path)


def rank_model(config: Config, model_config: ModelConfig, mesh: Mesh) -> Llama:
    """The model of the mesh's rank as it is trained, on the meta device; ValueError where it cannot be
    divided."""
    return build_model(config, model_config, mesh, lora_config(config, model_config))
