"""Where weights come from: Hugging Face's safetensors files, or a random generator, read lazily by one
interface."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from model.config import ModelConfig
from model.lora import generator_of
from model.weights.hub import read_json
from model.weights.safetensors_file import DTYPES, TensorFile, checksum
from model.weights.shapes import base_shapes

FLOATS = (
    "F64",
    "F32",
    "F16",
    "BF16",
)  # safetensors' names; integers and 8-bit floats would need scales beside them


class SafetensorsFiles:
    """The tensors of `directory`/`stem`.safetensors, or of the files that `stem`.safetensors.index.json
    lists.

    Headers are read at once, tensors when they are asked for, and of those only the slices. Raises ValueError
    for what is missing or damaged.
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
            raise ValueError(
                f"{directory} has neither {single.name} nor {index.name}: weights in safetensors were expected"
            )
        self.directory, self._file_of, self.shapes = directory, {}, {}
        for path in paths:
            try:
                file = TensorFile(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name, entry in file.entries.items():
                if name.endswith(".weight") and entry.dtype not in FLOATS:
                    raise ValueError(
                        f"{path}: the weight {name} is of type {entry.dtype}; {', '.join(FLOATS)} are read"
                    )
                self._file_of[name], self.shapes[name] = file, entry.shape
        lost = sorted(set(listed or ()) - set(self.shapes))
        if lost:
            raise ValueError(f"{index} lists {lost[0]} in {listed[lost[0]]}, which does not hold it")

    def check(self, expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Raise ValueError unless names and shapes are those of `expected`; `ignored` endings may be there
        besides."""
        missing = sorted(set(expected) - set(self.shapes))
        extra = sorted(
            name for name in set(self.shapes) - set(expected) if not name.endswith(ignored or ("\0",))
        )
        for names, problem in ((missing, "is missing"), (extra, "is not part of the model")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.directory}: the weight {names[0]} {problem}{more}")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.directory}: the weight {name} has shape {list(self.shapes[name])}; "
                    f"the config asks for {list(shape)}"
                )

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

    With `depth_scaled`, those that write to the residuals are divided by sqrt(2 x layers), as GPT-2's are
    (section 2.3 of "Language Models are Unsupervised Multitask Learners"). Each is drawn over its whole
    shape: the same on every topology.
    """

    def __init__(self, config: ModelConfig, seed: int, depth_scaled: bool = False):
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


def open_weights(
    directory: Path, config: ModelConfig, random_seed: int | None, depth_scaled: bool = False
) -> SafetensorsFiles | RandomWeights:
    """The model's weights: those in `directory`, or random ones where a seed is given."""
    return (
        SafetensorsFiles(directory)
        if random_seed is None
        else RandomWeights(config, random_seed, depth_scaled)
    )
