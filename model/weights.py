"""Weights in Hugging Face's safetensors format -> this rank's slices, read lazily; and random ones by the same interface."""
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from torch import nn

from model.files import read_json
from model.llama import Llama, LlamaConfig
from model.lora import LoraConfig, add_lora, generator_of, hf_name, initial_factor, is_lora
from model.tensor_file import DTYPES, TensorFile, checksum
from parallel.layers import Shard, named_shards

FLOATS = ("F64", "F32", "F16", "BF16")     # safetensors' names; integers and 8-bit floats would need scales beside them


class SafetensorsFiles:
    """The tensors of `directory`/`stem`.safetensors, or of the files that `stem`.safetensors.index.json lists.

    Headers are read at once, tensors when they are asked for, and of those only the slices. Raises ValueError for what is missing
    or damaged.
    """

    def __init__(self, directory: Path, stem: str = "model"):
        directory = Path(directory)
        index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise ValueError(f"{index} is damaged: it has no weight_map of names to files")
            paths = [directory / name for name in sorted(set(listed.values()))]
        elif single.is_file():
            listed, paths = None, [single]
        else:
            raise ValueError(f"{directory} has neither {single.name} nor {index.name}: weights in safetensors were expected")
        self.directory, self._file_of, self.shapes = directory, {}, {}
        for path in paths:
            try:
                file = TensorFile(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name, entry in file.entries.items():
                if name.endswith(".weight") and entry.dtype not in FLOATS:
                    raise ValueError(f"{path}: the weight {name} is of type {entry.dtype}; {', '.join(FLOATS)} are read")
                self._file_of[name], self.shapes[name] = file, entry.shape
        lost = sorted(set(listed or ()) - set(self.shapes))
        if lost:
            raise ValueError(f"{index} lists {lost[0]} in {listed[lost[0]]}, which does not hold it")

    def check(self, expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Raise ValueError unless names and shapes are those of `expected`; `ignored` endings may be there besides."""
        missing = sorted(set(expected) - set(self.shapes))
        extra = sorted(name for name in set(self.shapes) - set(expected) if not name.endswith(ignored or ("\0",)))
        for names, problem in ((missing, "is missing"), (extra, "is not part of the model")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.directory}: the weight {names[0]} {problem}{more}")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(f"{self.directory}: the weight {name} has shape {list(self.shapes[name])}; "
                                 f"the config asks for {list(shape)}")

    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> str:
        """A hash of the names, types and shapes, and of every byte of these tensors."""
        def one(name):
            digest = xxhash.xxh3_128()
            self._file_of[name].update(name, digest)
            return f"{name} {self.dtype(name)} {self.shapes[name]} {digest.hexdigest()}"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return checksum("\n".join(pool.map(one, sorted(shapes))).encode())

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._file_of[name].entries[name].dtype
        if dtype not in DTYPES:
            raise ValueError(f"{self._file_of[name].path}: {name} is of type {dtype}, which is not read")
        return DTYPES[dtype]

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """That part of the tensor, in the file's dtype."""
        return self._file_of[name].read(name, part)


class RandomWeights:
    """Weights as Hugging Face initialises them: normal(0, initializer_range), norms 1, biases 0.

    With `depth_scaled`, those that write to the residuals are divided by sqrt(2 x layers), as GPT-2's are (section 2.3 of
    "Language Models are Unsupervised Multitask Learners"). Each is drawn over its whole shape: the same on every topology.
    """

    def __init__(self, config: LlamaConfig, seed: int, depth_scaled: bool = False):
        self._std, self._seed, self._shapes = config.initializer_range, seed, base_shapes(config)
        self._residual_std = self._std / (2 * config.num_hidden_layers) ** 0.5 if depth_scaled else self._std

    def check(self, expected, ignored=()):
        """Every name and shape can be drawn."""

    def fingerprint(self, shapes) -> str:
        scaled = f", of residuals {self._residual_std}" if self._residual_std != self._std else ""
        return f"random: seed {self._seed}, initializer_range {self._std}{scaled}"

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)[part]
        std = self._residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self._std
        whole = torch.empty(shape).normal_(0, std, generator=generator_of(name, self._seed))
        return whole[part].clone()


def open_weights(directory: Path, config: LlamaConfig, random_seed: int | None,
                 depth_scaled: bool = False) -> SafetensorsFiles | RandomWeights:
    """The model's weights: those in `directory`, or random ones where a seed is given."""
    return SafetensorsFiles(directory) if random_seed is None else RandomWeights(config, random_seed, depth_scaled)


def base_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every weight of the model."""
    return trained_shapes(config, None)


def trained_shapes(config: LlamaConfig, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every parameter that is trained: LoRA's factors, or without LoRA all."""
    model = Llama(config)
    if lora:
        add_lora(model, lora)
    return {name: shard.global_shape for name, parameter, shard in named_shards(model) if parameter.requires_grad}


def check_weights(config: LlamaConfig, weights: SafetensorsFiles | RandomWeights) -> None:
    """Raise ValueError for a weight that is missing, unexpected or of another shape. Reads headers only."""
    # Old files carry a buffer of the rotary embedding; files of tied models may carry the head beside the embedding.
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))
    weights.check(base_shapes(config), ignored)


def fill(model: nn.Module, weights: SafetensorsFiles | RandomWeights, device, seed: int,
         read_trained: Callable[[str, Shard], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Give every parameter of the model its value on `device`, in the model's dtype: this rank's slice and nothing else is read.

    What is trained has the values of `read_trained` (of a checkpoint, or a peft adapter), where that is given; else LoRA factors
    start as peft's do (drawn by `seed`). Returns the values of what is trained, fp32 on the CPU: before they were rounded.
    """
    modules, trained = dict(model.named_modules()), {}
    for name, parameter, shard in list(named_shards(model)):
        if shard.spare:
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
