"""Weights -> the slices of a rank, on its device."""

from collections.abc import Callable

import torch
from torch import nn

from model.config import ModelConfig
from model.lora import hf_name, initial_factor, is_lora
from model.weights.shapes import base_shapes
from model.weights.sources import RandomWeights, SafetensorsFiles
from parallel.shard import Shard, named_shards


def check_weights(config: ModelConfig, weights: SafetensorsFiles | RandomWeights) -> None:
    """Raise ValueError for a weight that is missing, unexpected or of another shape. Reads headers only."""
    # Old files carry a buffer of the rotary embedding; files of tied models may carry the head beside the embedding.
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))
    weights.check(base_shapes(config), ignored)


def fill(
    model: nn.Module,
    weights: SafetensorsFiles | RandomWeights,
    device,
    seed: int,
    read_trained: Callable[[str, Shard], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Give every parameter of the model its value on `device`, in the model's dtype: this rank's slice and nothing else is read.

    What is trained has the values of `read_trained` (of a checkpoint, or a peft adapter), where that is given; else LoRA factors
    start as peft's do (drawn by `seed`). Returns the values of what is trained, fp32 on the CPU: before they were rounded.
    """
    modules, trained = dict(model.named_modules()), {}
    for name, parameter, shard in list(named_shards(model)):
        if shard.padding:
            value = torch.zeros(shard.shape)
        elif read_trained and parameter.requires_grad:
            value = read_trained(name, shard)
        elif is_lora(name):
            value = initial_factor(name, shard, seed)
        else:
            value = weights.read(hf_name(name), shard.slices)
        if parameter.requires_grad:
            trained[name] = value.float()
        owner, leaf = name.rsplit(".", 1)
        filled = nn.Parameter(value.to(model.dtype).to(device), requires_grad=parameter.requires_grad)
        setattr(modules[owner], leaf, filled)
    model.tie_weights()
    model.to(device)
    return trained
