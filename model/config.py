"""config.json -> ModelConfig: what the architecture needs of it, checked."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from model.weights.hub import why_not_loaded

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs of a Hugging Face config.json; the fields have its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ModelConfig":
        """Read `directory`/config.json; raises ValueError for what is no Llama, or one whose parts are not
        implemented."""
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(f"{directory} has no config.json: a Hugging Face model directory was expected")
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its checks of odd values raise
            raise ValueError(
                f"{directory}/config.json: not the config of a known model architecture "
                f"({why_not_loaded(error)}); markstep trains LlamaForCausalLM"
            ) from None
        if config.model_type != "llama" or (config.architectures or ["LlamaForCausalLM"]) != [
            "LlamaForCausalLM"
        ]:
            raise ValueError(
                f"{directory}/config.json: the architecture is {config.architectures or config.model_type}; "
                "markstep trains LlamaForCausalLM"
            )
        if config.hidden_act != "silu":
            raise ValueError(
                f"{directory}/config.json: hidden_act is {config.hidden_act!r}; Llama's is 'silu'"
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{directory}/config.json: the model is quantized (quantization_config); plain weights "
                "are read"
            )
        scaling = config.rope_scaling
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(
                f"{directory}/config.json: rope_scaling of type {kind!r}; 'llama3' or none is implemented"
            )
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        values["rope_scaling"] = {key: scaling.get(key) for key in LLAMA3_ROPE} if kind == "llama3" else None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{directory}/config.json: {error}") from None

    def __post_init__(self):
        """Raise ValueError for values that no model can have."""
        numbers = {
            field.name: (getattr(self, field.name), field.type)
            for field in fields(self)
            if field.type in (int, float)
        }
        numbers |= {f"rope_scaling.{key}": (value, float) for key, value in (self.rope_scaling or {}).items()}
        for name, (value, kind) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
                raise ValueError(
                    f"{name} is {value!r}; {'an integer' if kind is int else 'a number'} above 0 was expected"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
