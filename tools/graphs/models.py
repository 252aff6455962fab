"""Models by name, for tools that need a configuration and no weights."""

from pathlib import Path

from model.config import ModelConfig
from model.llama import Llama
from parallel.mesh import Mesh
from trainer.build import build_model
from trainer.config import SAMPLE, Config
from trainer.lora_settings import lora_config

LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}
LLAMA3_8B = LLAMA2_7B | LLAMA3 | {"intermediate_size": 14336}
# The values of the config.json that Meta published with each model.
PRESETS = {
    "llama2-7b": LLAMA2_7B,
    "llama3-8b": LLAMA3_8B,
    "llama3.1-8b": LLAMA3_8B | LLAMA31,
    "llama3.2-1b": LLAMA3_8B
    | LLAMA31
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
    },
    "llama3-70b": LLAMA3_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def read_model(name: str) -> ModelConfig:
    """The ModelConfig of a preset, of `tiny`, of a directory or of a config.json.

    Raises ValueError for any other name.
    """
    if name in PRESETS:
        return ModelConfig(**PRESETS[name])
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
