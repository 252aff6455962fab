"""Names and global shapes of the weights of a model."""

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraConfig, add_lora
from parallel.shard import named_shards


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every weight of the model."""
    return trained_shapes(config, None)


def trained_shapes(config: ModelConfig, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every parameter that is trained: LoRA's factors, or without LoRA all."""
    model = Llama(config)
    if lora:
        add_lora(model, lora)
    return {
        name: shard.global_shape for name, parameter, shard in named_shards(model) if parameter.requires_grad
    }
