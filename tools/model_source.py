"""The models that tools ask: a merged directory, a checkpoint without merging, or its base; built on any
topology."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraConfig, add_lora
from model.weights.hub import resolve
from model.weights.loading import check_weights, fill
from model.weights.shapes import base_shapes, trained_shapes
from model.weights.sources import RandomWeights, SafetensorsFiles, open_weights
from parallel.mesh import Group
from parallel.shard import Shard
from trainer.checkpoint.reader import Checkpoint
from trainer.job import load_tokenizer
from trainer.prompts import PromptFormat, end_tokens


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are read when it is built; `tokenizer`, `prompts` and `ends` say how it is asked."""

    name: str
    config: ModelConfig
    weights: SafetensorsFiles | RandomWeights
    lora: LoraConfig | None
    read_trained: Callable[[str, Shard], torch.Tensor] | None
    tokenizer: object
    prompts: PromptFormat
    ends: set[int]

    @classmethod
    def of_model(cls, name: str) -> "ModelSource":
        """A Hugging Face directory or hub id, such as merging writes. Raises ValueError where it is none."""
        directory = resolve(name, "--model")
        config = ModelConfig.from_pretrained(directory)
        weights = SafetensorsFiles(directory)
        check_weights(config, weights)
        return cls(name, config, weights, None, None, *_asked(directory, config))

    @classmethod
    def of_checkpoint(cls, path: Path, model_id: str | None = None, base_only: bool = False) -> "ModelSource":
        """A checkpoint, or with `base_only` the model that its training began with; `model_id` is where that
        is now.

        Raises ValueError where the path is no checkpoint, or the base is not the one that was trained on.
        """
        checkpoint = Checkpoint(path)
        config = ModelConfig.from_pretrained(checkpoint.path)
        checkpoint.check_tensors(trained_shapes(config, checkpoint.lora), kinds=("parameter",))
        weights = open_base(checkpoint, config, model_id) if checkpoint.lora or base_only else None
        asked = _asked(checkpoint.path, config)
        if base_only:
            return cls(f"base of {path}", config, weights, None, None, *asked)
        return cls(str(path), config, weights, checkpoint.lora, partial(checkpoint.read, "parameter"), *asked)

    def build(self, group: Group, device, dtype: torch.dtype, **layout) -> Llama:
        """The model of `dtype`, sharded over the group: this rank's slices are read, and nothing else. LoRA
        stays apart."""
        model = Llama(self.config, group, dtype, **layout)
        if self.lora:
            add_lora(model, self.lora)
        fill(model, self.weights, device, 0, self.read_trained)
        return model.eval().requires_grad_(False)


def _asked(directory: Path, config: ModelConfig):
    tokenizer = load_tokenizer(directory)
    return (
        tokenizer,
        PromptFormat.read(directory, tokenizer),
        end_tokens(directory, tokenizer, config.vocab_size),
    )


def open_base(
    checkpoint: Checkpoint, config: ModelConfig, model_id: str | None
) -> SafetensorsFiles | RandomWeights:
    """The weights that the checkpoint's training began with; raises ValueError where those in their place are
    others."""
    random_seed = None if model_id else checkpoint.manifest["random_seed"]
    directory = Path() if random_seed is not None else resolve(model_id or checkpoint.manifest["model"])
    weights = open_weights(
        directory, config, random_seed, checkpoint.manifest["config"].get("depth_scaled_init", False)
    )
    check_weights(config, weights)
    if weights.fingerprint(base_shapes(config)) != checkpoint.manifest["identity"]["base"]:
        raise ValueError(
            f"{directory} is not the model that {checkpoint.path} was trained on: its weights are others"
        )
    return weights
