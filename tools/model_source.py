"""The models that tools prompt: a merged directory, a checkpoint without merging, or its base model."""

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
from trainer.checkpoint.model_files import check_listed
from trainer.checkpoint.reader import Checkpoint
from trainer.prompts import PromptFormat, end_tokens, keep_date
from trainer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are read when it is built, on any topology.

    `prompts`: how a question becomes tokens; `ends`: the tokens that end an answer. `lora` and `read_trained`
    are None where all weights come from `weights`.
    """

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
        """The model in a Hugging Face directory, such as merging writes, or of a hub id.

        Raises ValueError where there is none.
        """
        directory = resolve(name, "--model")
        config = ModelConfig.from_pretrained(directory)
        weights = SafetensorsFiles(directory)
        check_weights(config, weights)
        return cls(name, config, weights, None, None, *_prompting(directory, config))

    @classmethod
    def of_checkpoint(cls, path: Path, model_id: str | None = None, base_only: bool = False) -> "ModelSource":
        """The model of a checkpoint, or with `base_only` the one that its training began with.

        `model_id`: the base model, where it is no longer where training read it. Raises ValueError where the
        path is no checkpoint, one of the bytes that are read is not as saved, or the base is not the one that
        was trained on.
        """
        checkpoint = Checkpoint(path)
        check_listed(checkpoint.path, checkpoint.manifest["files"])
        config = ModelConfig.from_pretrained(checkpoint.path)
        checkpoint.check_tensors(trained_shapes(config, checkpoint.lora), kinds=("parameter",))
        weights = open_base(checkpoint, config, model_id) if checkpoint.lora or base_only else None
        prompting = _prompting(checkpoint.path, config)
        if base_only:
            return cls(f"base of {path}", config, weights, None, None, *prompting)
        checkpoint.verify(kinds=("parameter",))
        read_trained = partial(checkpoint.read, "parameter")
        return cls(str(path), config, weights, checkpoint.lora, read_trained, *prompting)

    def build(self, group: Group, device, dtype: torch.dtype, **layout) -> Llama:
        """The model in `dtype`, sharded over the group, with LoRA not merged into it.

        A rank reads its own slices of the weights and nothing else. `layout`: further arguments of Llama.
        """
        model = Llama(self.config, group, dtype, **layout)
        if self.lora:
            add_lora(model, self.lora)
        fill(model, self.weights, device, 0, self.read_trained)
        return model.eval().requires_grad_(False)


def _prompting(directory: Path, config: ModelConfig) -> tuple[object, PromptFormat, set[int]]:
    """(tokenizer, prompt format, tokens that end an answer) of the model in `directory`."""
    tokenizer = load_tokenizer(directory)
    keep_date(tokenizer, directory)
    return (
        tokenizer,
        PromptFormat.read(directory, tokenizer),
        end_tokens(directory, tokenizer, config.vocab_size),
    )


def open_base(
    checkpoint: Checkpoint, config: ModelConfig, model_id: str | None
) -> SafetensorsFiles | RandomWeights:
    """The weights that the checkpoint's training began with.

    Raises ValueError where the base model now has other weights.
    """
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
