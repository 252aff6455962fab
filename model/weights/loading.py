"""Loading: every parameter of a model gets this rank's slice of the weights, on its device."""

from collections.abc import Callable

import torch
from torch import nn

from model.config import ModelConfig
from model.lora import hf_name, initial_factor, is_lora
from model.weights.shapes import base_shapes
from model.weights.sources import RandomWeights, SafetensorsFiles
from parallel.shard import Shard, named_shards


def check_weights(
    config: ModelConfig, weights: SafetensorsFiles | RandomWeights, compare: bool = True
) -> None:
    """Raise ValueError for a weight that is missing, unexpected or of another shape.

    Only headers are read; but a head that the config ties to the embedding must equal it, unless another
    process is to `compare` the two.
    """
    # Old files contain a buffer of the rotary embedding.
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    weights.check(base_shapes(config), ("rotary_emb.inv_freq",), copies, compare)


def fill(
    model: nn.Module,
    weights: SafetensorsFiles | RandomWeights,
    device,
    seed: int,
    read_trained: Callable[[str, Shard], torch.Tensor] | None = None,
    values_follow: bool = False,
) -> dict[str, torch.Tensor]:
    """Give every parameter of the model its value on `device`, in the model's dtype.

    Only this rank's slices are read. `read_trained` reads the trained parameters from a checkpoint or a peft
    adapter; without it, LoRA factors are initialised as peft does, by `seed`, and all other parameters come
    from `weights`. Returns the values of the trained parameters by name, fp32 on the CPU, before rounding.
    Where `values_follow`, trained parameters are made on the device without values, and none are returned.
    """
    modules, trained = dict(model.named_modules()), {}
    for name, parameter, shard in list(named_shards(model)):
        owner, leaf = name.rsplit(".", 1)
        if values_follow and parameter.requires_grad:
            empty = torch.empty(shard.local_shape, dtype=model.dtype, device=device)
            setattr(modules[owner], leaf, nn.Parameter(empty))
            continue
        if shard.padding:
            value = torch.zeros(shard.local_shape)
        elif read_trained and parameter.requires_grad:
            value = read_trained(name, shard)
        elif is_lora(name):
            value = initial_factor(name, shard, seed)
        else:
            value = weights.read_finite(hf_name(name), shard.slices)
        value = shard.pad(value)
        if parameter.requires_grad:
            trained[name] = value.float()
        filled = nn.Parameter(value.to(model.dtype).to(device), requires_grad=parameter.requires_grad)
        setattr(modules[owner], leaf, filled)
    model.tie_weights()
    model.to(device)
    return trained
