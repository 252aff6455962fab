"""Sources of weights with one interface: Hugging Face's safetensors files, or a random generator."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from heapq import heapify, heapreplace
from pathlib import Path

import torch
import xxhash

from model.config import ModelConfig
from model.lora import generator_of
from model.weights.hub import read_json
from model.weights.safetensors_file import DTYPES, TensorFile, as_bytes, checksum, is_finite
from model.weights.shapes import base_shapes
from parallel.runtime import Peers

INDEX = ".safetensors.index.json"
ALONE = Peers(None, 0, 1, 0, "")
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; integers and 8-bit floats would need scales


class SafetensorsFiles:
    """The tensors of `directory`/`stem`.safetensors, or of the files listed in `stem`.safetensors.index.json.

    `shapes` has the shape of each tensor by its name. Headers are read at once; of a tensor, only the
    requested part is read. Raises ValueError where a file is missing or damaged, and where both are there.
    """

    def __init__(self, directory: Path, stem: str = "model"):
        self.directory, self._file_of, self.shapes = Path(directory), {}, {}
        paths, listed = _find_files(self.directory, stem)
        for path in paths:
            try:
                file = TensorFile(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name, entry in file.entries.items():
                if listed.get(name, path.name) != path.name:
                    continue  # a copy, where the index has the tensor in another file
                if name.endswith(".weight") and entry.dtype not in FLOATS:
                    raise ValueError(
                        f"{path}: the weight {name} is of type {entry.dtype}; {', '.join(FLOATS)} are read"
                    )
                self._file_of[name], self.shapes[name] = file, entry.shape
        lost = sorted(set(listed) - set(self.shapes))
        if lost:
            index = self.directory / f"{stem}{INDEX}"
            raise ValueError(f"{index} lists {lost[0]} in {listed[lost[0]]}, which does not hold it")

    def check(
        self,
        expected: dict[str, tuple[int, ...]],
        ignored: tuple[str, ...] = (),
        copies: dict[str, str] | None = None,
        compare: bool = True,
    ) -> None:
        """Raise ValueError unless names and shapes are those of `expected`.

        Further tensors may be there whose names end with one of `ignored`, or are in `copies` {name: name of
        the one that it must equal}; those are read, if this is to `compare` them.
        """
        copies = {name: original for name, original in (copies or {}).items() if name in self.shapes}
        ignored = (*ignored, *copies)
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
        for name, original in copies.items() if compare else ():
            if not self._equal(name, original):
                raise ValueError(
                    f"{self._file_of[name].path}: {name} differs from {original}, and the config ties them "
                    "(tie_word_embeddings): one of the two is wrong"
                )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        if self.shapes[one] != self.shapes[other] or self.dtype(one) != self.dtype(other):
            return False
        chunks = (self._file_of[name].chunks(name) for name in (one, other))
        return all(torch.equal(*pair) for pair in zip(*chunks, strict=True))

    def headers(self) -> dict[str, tuple[int, str]]:
        """{name of a file: (its bytes, the checksum of its header)}."""
        files = {file.path.name: file for file in self._file_of.values()}
        return {name: (file.path.stat().st_size, file.header_checksum) for name, file in files.items()}

    def fingerprint(self, shapes: dict[str, tuple[int, ...]], peers: Peers = ALONE) -> str:
        """A hash of the names, dtypes, shapes and bytes of these tensors. Each of the processes reads some.

        Raises ValueError, in all processes, where one has a NaN or an infinity.
        """

        def describe(name):
            digest = xxhash.xxh3_128()
            for chunk in self._file_of[name].chunks(name):
                self._check_finite(name, chunk)
                digest.update(as_bytes(chunk))
            return f"{name} {self.dtype(name)} {self.shapes[name]} {digest.hexdigest()}"

        sizes = {name: math.prod(shape) * self.dtype(name).itemsize for name, shape in shapes.items()}
        mine, problem = divide(sizes, peers.world_size, peers.local_world_size)[peers.rank], None
        with ThreadPoolExecutor(max(1, os.cpu_count() // peers.local_world_size)) as pool:
            try:
                described = dict(zip(mine, pool.map(describe, mine), strict=True))
            except ValueError as error:
                described, problem = {}, f"{peers.name_of(peers.rank)}: {error}"
                if peers.world_size == 1:
                    raise
        found = peers.collect("hash of the base weights", [described, problem])
        problems = [problem for _, problem in found or () if problem]
        peers.raise_together("hash of the base weights", problems[0] if problems else None)
        every = {name: line for part, _ in found or () for name, line in part.items()}
        return peers.share("base", checksum("\n".join(every[name] for name in sorted(every)).encode()))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the file; raises ValueError for one that torch cannot hold."""
        dtype = self._file_of[name].entries[name].dtype
        if dtype not in DTYPES:
            raise ValueError(f"{self._file_of[name].path}: {name} is of type {dtype}, which is not read")
        return DTYPES[dtype]

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """The slices `part` of the tensor, in the file's dtype."""
        return self._file_of[name].read(name, part)

    def read_finite(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """As `read`, of a weight that training begins with: raises ValueError for a NaN or an infinity."""
        values = self.read(name, part)
        self._check_finite(name, values)
        return values

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        """Raise ValueError where values of the tensor are not finite; as fast as memory."""
        if not is_finite(values):
            raise ValueError(
                f"{self._file_of[name].path}: the weight {name} has values that are NaN or infinite: the "
                "file is damaged, or of a training that failed"
            )


def divide(sizes: dict[str, int], processes: int, of_a_machine: int = 1) -> list[list[str]]:
    """Names of tensors with their bytes -> the names that each process reads, about as many bytes each.

    The largest come first, each to the process that has the least so far; of equals, machines take turns.
    `of_a_machine`: the number of processes with consecutive ranks on a machine.
    """
    heap = [(0, rank % of_a_machine, rank) for rank in range(processes)]
    parts: list[list[str]] = [[] for _ in heap]
    heapify(heap)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken, position, rank = heap[0]
        parts[rank].append(name)
        heapreplace(heap, (taken + sizes[name], position, rank))
    return parts


def _find_files(directory: Path, stem: str) -> tuple[list[Path], dict[str, str]]:
    """(paths of the files, {tensor name: file name} of the index or {} where there is none)."""
    index, single = directory / f"{stem}{INDEX}", directory / f"{stem}.safetensors"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index} is damaged: it has no weight_map of names to files")
        files = sorted(set(listed.values()))
        if single.is_file() and single.name not in files:
            raise ValueError(
                f"{directory} has both {single.name} and {index.name}, which lists {files[0]}: which of them "
                "is the model is not known; move one away"
            )
        return [directory / name for name in files], listed
    if not single.is_file():
        raise ValueError(
            f"{directory} has neither {single.name} nor {index.name}: weights in safetensors were expected"
        )
    return [single], {}


class RandomWeights:
    """Weights as Hugging Face initialises them: normal(0, initializer_range), norms 1, biases 0.

    With `depth_scaled`, projections that write to the residual stream are divided by sqrt(2 x layers), as in
    GPT-2 (section 2.3 of "Language Models are Unsupervised Multitask Learners"). Each weight is drawn as a
    whole, so it is the same on every topology.
    """

    def __init__(self, config: ModelConfig, seed: int, depth_scaled: bool = False):
        self._std, self._seed, self._shapes = config.initializer_range, seed, base_shapes(config)
        self._residual_std = self._std / (2 * config.num_hidden_layers) ** 0.5 if depth_scaled else self._std

    def check(self, expected, ignored=(), copies=None, compare=True):
        """Do nothing: every name and shape can be drawn."""

    def headers(self) -> dict:
        """Nothing: there are no files."""
        return {}

    def fingerprint(self, shapes, peers=ALONE) -> str:
        """A text that is the same where the weights are."""
        scaled = f", of residuals {self._residual_std}" if self._residual_std != self._std else ""
        return f"random: seed {self._seed}, initializer_range {self._std}{scaled}"

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read_finite(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """As `read`: what is drawn is finite."""
        return self.read(name, part)

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """The slices `part` of the weight, fp32."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)[part]
        std = self._residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self._std
        whole = torch.empty(shape).normal_(0, std, generator=generator_of(name, self._seed))
        return whole[part].clone()


def open_weights(
    directory: Path, config: ModelConfig, random_seed: int | None, depth_scaled: bool = False
) -> SafetensorsFiles | RandomWeights:
    """The weights in `directory`, or random ones where `random_seed` is not None."""
    if random_seed is None:
        return SafetensorsFiles(directory)
    return RandomWeights(config, random_seed, depth_scaled)
