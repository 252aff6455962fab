"""neuronx-distributed's own sharded checkpoints of Llama -> Hugging Face's weights, in bands of rows.

What the files hold was taken from neuronx-distributed 0.18 (Neuron SDK 2.29). Each tensor and pipeline
parallel rank has a file with its part of the model, {name: tensor}; of the data parallel ranks the first
alone writes.

    <tag>/model/dp_rank_00_tp_rank_00_pp_rank_00.pt     trainer/checkpoint/reader.py: nxd.save_checkpoint
    <dir>/tp_rank_00_pp_rank_00/checkpoint.pt           parallel_layers/checkpointing.py, and Lightning: the
    part is the value of
    <dir>/tp_rank_00_pp_rank_00                         "model" or "state_dict"; the second is the form with
    xser

With xser a file holds torch_xla.utils.serialization.TensorReference(n) in a tensor's place, and
<file>.tensors/tensor_<n>.pt the tensor. Names are Hugging Face's, and layers are numbered through all
pipeline stages (pipeline/model.py). A rank's part:

    qkv_proj.weight_q, weight_k, weight_v       modules/qkv_linear.py: the rows of its heads
    qkv_proj.weight_qkv, qkv_proj.weight        its q, k and v one below the other
    gate_up_proj.weight                         its gate and up, likewise
    (examples/training/llama/modeling_llama_nxd.py)
    q_proj, k_proj, v_proj, gate_proj, up_proj, embed_tokens, lm_head: rows    o_proj, down_proj: columns
    norms: the whole

With R times as many ranks as KV heads, R ranks hold each of them. On Trainium 1 these are ranks i, i + heads,
i + 2 heads, ..., on Trainium 2 neighbours (parallel_layers/parallel_state.py: arrange_kv_groups). A rank
attends its own heads only, so the query heads, and o_proj's columns, stand where the KV heads do that they
attend (scripts/checkpoint_converter.py has the same order).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from model.config import ModelConfig

BAND_BYTES, MAPPED_BYTES = 32 * 2**20, 256 * 2**20
RANK = re.compile(r"(?:dp_rank_00_)?(ep_rank_\d+_)?tp_rank_(\d+)_pp_rank_(\d+)(?:\.pt)?")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEYS, NORM = ("k_proj.weight", "v_proj.weight"), "norm.weight"
COLUMNS = ("o_proj.weight", "down_proj.weight")  # RowParallelLinear; all other matrices are divided by rows
PARTS = {
    "qkv_proj.weight_q": ("q_proj",),
    "qkv_proj.weight_k": ("k_proj",),
    "qkv_proj.weight_v": ("v_proj",),
    "qkv_proj.weight_qkv": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj.weight": ("gate_proj", "up_proj"),
}


class TensorReference:
    """Stands in for torch_xla's class of that name, which holds the number `tid` of a tensor's file and
    nothing else."""


def load(path: Path):
    """What `path` holds, its tensors mapped, not read. Tensors, plain containers and TensorReferences are all
    that is loaded."""
    try:
        with torch.serialization.safe_globals(
            [(TensorReference, "torch_xla.utils.serialization.TensorReference")]
        ):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load's errors for damaged files share no base class
        reason = str(error).split("WeightsUnpickler error:")[
            -1
        ]  # before that stands advice to load it with less care
        named = re.search(r"GLOBAL (\S+)", reason)
        problem = (
            f"it holds {named[1]}; tensors and plain containers are loaded"
            if named
            else " ".join(reason.split())[:200]
        )
        raise ValueError(f"{path} cannot be read: {problem}") from None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape are the same to the bit: NaNs are equal, 0 and -0 are not."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


class Mapped:
    """Files that are mapped for many reads, and let go after MAPPED_BYTES of them, lest their pages pile up
    in memory."""

    def __init__(self):
        self._states, self._bytes = {}, 0

    def state(self, file: "RankFile") -> dict:
        return self._states.get(file.path) or self._states.setdefault(file.path, file.state())

    def count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAPPED_BYTES:
            self._states, self._bytes = {}, 0


class RankFile:
    """The part of one tensor and pipeline parallel rank. `tensors` has shape and dtype of each, by
    neuronx-distributed's name."""

    def __init__(self, path: Path, mapped: Mapped):
        self.path, self.tensors, self._references, self._mapped = path, {}, {}, mapped
        for key, value in self.state().items():
            if "lora" in str(key) or ".base_layer." in str(key):
                raise ValueError(
                    f"{path} holds {key}: neuronx-distributed's LoRA is not read, only models without adapters"
                )
            if isinstance(value, TensorReference):
                if not isinstance(getattr(value, "tid", None), int):
                    raise ValueError(f"{path} is damaged: the reference to the tensor {key} has no number")
                self._references[key] = Path(f"{path}.tensors") / f"tensor_{value.tid}.pt"
                value = load(self._references[key])
            if (
                not isinstance(key, str)
                or not isinstance(value, torch.Tensor)
                or not value.is_floating_point()
            ):
                raise ValueError(f"{path}: {key} is no tensor of floating point numbers with a name")
            self.tensors[key] = (tuple(value.shape), value.dtype)

    def state(self) -> dict:
        """The model's part: the whole file, or what it holds under the names that writers of more than a
        model use."""
        held = load(self.path)
        for key in ("model", "state_dict"):
            if isinstance(held, dict) and isinstance(held.get(key), dict):
                held = held[key]
        if not isinstance(held, dict):
            raise ValueError(f"{self.path} holds no names and tensors, but a {type(held).__name__}")
        return held

    def read(self, key: str, rows: slice) -> torch.Tensor:
        """Those rows, contiguous and in memory."""
        stored = load(self._references[key]) if key in self._references else self._mapped.state(self)[key]
        band = stored[rows].clone(memory_format=torch.contiguous_format)
        self._mapped.count(band.nbytes)
        return band


def find_ranks(directory: Path) -> list[list[RankFile]]:
    """The files of all ranks, [pipeline stage][tensor parallel rank]; raises ValueError where one is missing."""
    folder = directory / "model" if (directory / "model").is_dir() else directory
    tag = folder.parent if folder.name == "model" else folder
    if (tag / "checkpoint").is_file() and not (tag / "done").is_file():
        raise ValueError(f"{tag} is incomplete: neuronx-distributed has not written its file `done`")
    paths = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (match := RANK.fullmatch(path.name)):
            continue
        if match[1]:
            raise ValueError(f"{path} is an expert parallel rank's: a Llama has no experts")
        rank = int(match[3]), int(match[2])
        if rank in paths:
            raise ValueError(
                f"{path} and {paths[rank].name} are both of tensor parallel rank {rank[1]}, stage {rank[0]}"
            )
        paths[rank] = path
    if not paths:
        raise ValueError(f"{folder} holds no file dp_rank_00_tp_rank_.._pp_rank_...pt")
    stages, tp = (max(numbers) + 1 for numbers in zip(*paths, strict=True))
    mapped, files = Mapped(), [[] for _ in range(stages)]
    for stage, rank in product(range(stages), range(tp)):
        if (stage, rank) not in paths:
            name = re.sub(
                r"tp_rank.*\d", f"tp_rank_{rank:02d}_pp_rank_{stage:02d}", next(iter(paths.values())).name
            )
            raise ValueError(
                f"{folder / name} is missing: there are {tp} tensor parallel ranks and {stages} pipeline stages"
            )
        path = paths[stage, rank]
        files[stage].append(RankFile(path / "checkpoint.pt" if path.is_dir() else path, mapped))
    return files


def check_alike(files: list[RankFile]) -> None:
    """Raise ValueError unless the tensor parallel ranks of a stage hold the same names, shapes and dtypes."""
    for file in files[1:]:
        for key in {**files[0].tensors, **file.tensors}:
            here, there = (each.tensors.get(key, "missing") for each in (file, files[0]))
            if here != there:
                raise ValueError(f"{file.path}: {key} is {here}; in {files[0].path.name} it is {there}")


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every weight; the head's too where it is tied to the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    return {
        EMBEDDING: (config.vocab_size, hidden),
        **layers,
        "model.norm.weight": (hidden,),
        HEAD: (config.vocab_size, hidden),
    }


def names_in(key: str) -> list[str]:
    """Hugging Face's names of the weights that lie in neuronx-distributed's `key`, one below the other."""
    for ending, modules in PARTS.items():
        if key.endswith("." + ending):
            return [f"{key.removesuffix(ending)}{module}.weight" for module in modules]
    return [key]


@dataclass(frozen=True)
class Place:
    """Where the weight of `shape` lies: the tensor parallel ranks' parts are rows [start, stop) of tensor
    `key` in `files`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    files: list[RankFile]
    key: str
    start: int
    stop: int

    @property
    def bounds(self) -> list[slice]:
        """The rows of a rank's tensor in bands, each of at most BAND_BYTES where it is as wide as the whole
        weight."""
        step = max(1, BAND_BYTES // (torch.Size(self.shape[1:]).numel() * self.dtype.itemsize))
        return [slice(start, min(start + step, self.stop)) for start in range(self.start, self.stop, step)]

    def same(self, one: int, other: int) -> bool:
        """Whether two tensor parallel ranks hold the same part."""
        return all(
            same_bits(*(self.files[rank].read(self.key, rows) for rank in (one, other)))
            for rows in self.bounds
        )


class NxdCheckpoint:
    """A checkpoint of neuronx-distributed as a Hugging Face model. `shapes` has the name and shape of each of
    its weights.

    `directory` is the tag's, its `model`, or the older layout's. Raises ValueError, in one line, for what is
    missing, damaged, or not what the config asks for; for replicas that differ when they are read. Nothing is
    averaged or guessed.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        if config.attention_bias or config.mlp_bias:
            raise ValueError(
                f"{directory}: the config asks for biases, which neuronx-distributed's Llama does not have"
            )
        stages, shapes, heads = find_ranks(Path(directory)), llama_shapes(config), config.num_key_value_heads
        self._places, self._tp = {}, len(stages[0])
        fused = any(
            ".qkv_proj." in key for files in stages for key in files[0].tensors
        )  # it alone replicates, and whole heads
        replicas = (
            self._tp // heads
            if fused and self._tp % heads == config.num_attention_heads % self._tp == 0
            else 1
        )
        for files in stages:
            check_alike(files)
            for key in files[0].tensors:
                if not key.endswith(
                    "rotary_emb.inv_freq"
                ):  # a buffer that old models carry; the config says it all
                    self._place(files, key, shapes, replicas)
        self._tied = config.tie_word_embeddings
        self.shapes = {name: shape for name, shape in shapes.items() if name != HEAD or not self._tied}
        missing = [name for name in self.shapes if name not in self._places]
        if missing:
            raise ValueError(
                f"{directory}: {len(missing)} of the config's weights are missing, first {missing[0]}"
            )
        self._key_groups = self._find_key_groups(replicas)

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether the directory, or its `model`, holds files or directories of neuronx-distributed's ranks."""
        return any(
            RANK.fullmatch(path.name)
            for folder in (Path(directory), Path(directory) / "model")
            if folder.is_dir()
            for path in folder.iterdir()
        )

    def dtype(self, name: str) -> torch.dtype:
        """The files' dtype of the weight."""
        return self._places[name].dtype

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive bands of rows of the weight, [rows, columns] or [rows], each of at most 32 MB (or of
        one row).

        Raises ValueError where replicas differ: of norms and KV heads, or the head's of the embedding that it
        is tied to.
        """
        tied = self._bands(HEAD) if name == EMBEDDING and self._tied and HEAD in self._places else None
        for band in self._bands(name):
            if tied and not same_bits(band, next(tied)):
                raise ValueError(
                    f"{self._places[HEAD].files[0].path}: {HEAD} differs from {EMBEDDING}, and the config ties them"
                )
            yield band

    def _place(
        self, files: list[RankFile], key: str, shapes: dict[str, tuple[int, ...]], replicas: int
    ) -> None:
        """Note which weights lie in `key`; raises ValueError unless they are the config's, and of the shape
        it asks for."""
        names, path, (held, dtype) = names_in(key), files[0].path, files[0].tensors[key]
        if any(name not in shapes for name in names):
            raise ValueError(f"{path}: {key} is no weight of the config's Llama")
        heights = []
        for name in names:
            copies = replicas if name.endswith(KEYS) else self._tp if name.endswith((*COLUMNS, NORM)) else 1
            heights.append(shapes[name][0] * copies / self._tp)
        width = [size / self._tp if names[0].endswith(COLUMNS) else size for size in shapes[names[0]][1:]]
        if [sum(heights), *width] != list(held) or any(height % 1 for height in heights):
            wholes = " and ".join(f"{list(shapes[name])} ({name})" for name in names)
            raise ValueError(
                f"{path}: {key} is {list(held)} on each of {self._tp} tensor parallel ranks; the config's whole is "
                f"{wholes}: is a rank's file missing?"
            )
        start = 0
        for name, height in zip(names, map(int, heights), strict=True):
            if name in self._places:
                other = self._places[name]
                raise ValueError(
                    f"{path}: {key} holds {name}, and so does {other.key} of {other.files[0].path.name}"
                )
            self._places[name] = Place(shapes[name], dtype, files, key, start, start + height)
            start += height

    def _find_key_groups(self, replicas: int) -> list[tuple[int, ...]]:
        """For each slice of the KV heads the ranks that hold it: as on Trainium 1 or on 2, which the values
        alone tell."""
        slices = self._tp // replicas
        apart = [tuple(range(number, self._tp, slices)) for number in range(slices)]
        neighbours = [tuple(range(number * replicas, (number + 1) * replicas)) for number in range(slices)]
        if apart == neighbours:
            return apart
        place = self._places["model.layers.0.self_attn.k_proj.weight"]
        agreeing = [
            groups
            for groups in (apart, neighbours)
            if all(place.same(group[0], rank) for group in groups for rank in group[1:])
        ]
        if len(agreeing) != 1:
            problem = "all KV heads are the same" if agreeing else "the replicas of KV heads differ"
            raise ValueError(
                f"{place.files[0].path.parent}: {problem} in {place.key}: which rank holds which heads is not known"
            )
        return agreeing[0]

    def _groups(self, name: str) -> list[tuple[int, ...]]:
        """The ranks that hold the weight's slices, in the order of the slices; those of a group hold the same
        one."""
        if name.endswith(NORM):
            return [tuple(range(self._tp))]
        if name.endswith(KEYS):
            return self._key_groups
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            return [(rank,) for group in self._key_groups for rank in group]
        return [(rank,) for rank in range(self._tp)]

    def _bands(self, name: str) -> Iterator[torch.Tensor]:
        place, groups = self._places[name], self._groups(name)
        if name.endswith(COLUMNS):
            for rows in place.bounds:
                yield torch.cat([place.files[rank].read(place.key, rows) for (rank,) in groups], dim=1)
            return
        for files in ([place.files[rank] for rank in group] for group in groups):
            for rows in place.bounds:
                band = files[0].read(place.key, rows)
                for file in files[1:]:
                    if not same_bits(band, file.read(place.key, rows)):
                        raise ValueError(
                            f"{file.path}: {place.key} differs from its replica in {files[0].path.name}"
                        )
                yield band
