"""The names and global shapes of a model's weights."""

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraConfig, add_lora
from parallel.shard import named_shards


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{Hugging Face's name: shape} of every weight of the model."""
    return trained_shapes(config, None)


def trained_shapes(config: ModelConfig, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """{name: global shape} of every trained parameter: LoRA's factors, or all parameters without LoRA."""
    model = Llama(config)
    if lora:
        add_lora(model, lora)
    return {
        name: shard.global_shape for name, parameter, shard in named_shards(model) if parameter.requires_grad
    }
