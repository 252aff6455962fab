"""Read neuronx-distributed's sharded checkpoints of Llama as Hugging Face's weights, in bands of rows.

Names are Hugging Face's, and layers are numbered through all pipeline stages (neuronx-distributed's
pipeline/model.py). The part of a tensor parallel rank holds

    qkv_proj.weight_q, weight_k, weight_v       the rows of its heads (modules/qkv_linear.py)
    qkv_proj.weight_qkv, qkv_proj.weight        its q, k and v, one below the other
    gate_up_proj.weight                         its gate and up, likewise
                                                (examples/training/llama/modeling_llama_nxd.py)
    q_proj, k_proj, v_proj, gate_proj, up_proj, embed_tokens, lm_head: rows    o_proj, down_proj: columns
    norms: the whole

With R times as many ranks as KV heads, R ranks hold each of them. On Trainium 1 these are ranks i, i + heads,
i + 2 heads, ..., on Trainium 2 neighbours (parallel_layers/parallel_state.py: arrange_kv_groups). A rank
attends with its own heads only, so its query heads, and o_proj's columns, are those that attend its KV heads
(scripts/checkpoint_converter.py has the same order).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import ModelConfig
from model.weights.shapes import base_shapes
from tools.merge_checkpoint.nxd_files import RANK, RankFile, check_alike, find_ranks, same_bits

BAND_BYTES = 32 * 2**20
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEYS, NORM = ("k_proj.weight", "v_proj.weight"), "norm.weight"
COLUMNS = ("o_proj.weight", "down_proj.weight")  # RowParallelLinear; all other matrices are divided by rows
BUFFER = "rotary_emb.inv_freq"  # old models carry it; the config says the same
PARTS = {
    "qkv_proj.weight_q": ("q_proj",),
    "qkv_proj.weight_k": ("k_proj",),
    "qkv_proj.weight_v": ("v_proj",),
    "qkv_proj.weight_qkv": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj.weight": ("gate_proj", "up_proj"),
}


def names_in(key: str) -> list[str]:
    """Hugging Face's names of the weights in neuronx-distributed's tensor `key`, one below the other."""
    for ending, modules in PARTS.items():
        if key.endswith("." + ending):
            return [f"{key.removesuffix(ending)}{module}.weight" for module in modules]
    return [key]


@dataclass(frozen=True)
class WeightParts:
    """Where a weight's parts are: rows [start, stop) of the tensor `key` of each tensor parallel rank.

    `shape`: of the whole weight. `files`: one for each rank.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    files: list[RankFile]
    key: str
    start: int
    stop: int

    @property
    def bands(self) -> list[slice]:
        """A rank's rows in bands: at the whole weight's width, at most BAND_BYTES each, or one row."""
        step = max(1, BAND_BYTES // (torch.Size(self.shape[1:]).numel() * self.dtype.itemsize))
        return [slice(start, min(start + step, self.stop)) for start in range(self.start, self.stop, step)]

    def same(self, one: int, other: int) -> bool:
        """Whether two tensor parallel ranks hold the same part."""
        return all(
            same_bits(*(self.files[rank].read(self.key, rows) for rank in (one, other)))
            for rows in self.bands
        )


class NxdCheckpoint:
    """A checkpoint of neuronx-distributed as a Hugging Face model. `shapes`: {name of a weight: its shape}.

    `directory` is the tag's, its `model`, or that of the older layout. Raises ValueError, in one line, for
    what is missing, damaged or does not fit the config; while reading, for replicas that differ. Nothing is
    averaged or guessed.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        if config.attention_bias or config.mlp_bias or config.qkv_bias or config.qk_norm:
            raise ValueError(
                f"{directory}: the config asks for biases or norms of queries and keys, which "
                "neuronx-distributed's Llama does not have"
            )
        stages = find_ranks(Path(directory))
        # The files may hold the head where the config ties it to the embedding.
        shapes = base_shapes(replace(config, tie_word_embeddings=False))
        self._parts, self._tp, self._tied = {}, len(stages[0]), config.tie_word_embeddings
        replicas = self._kv_replicas(stages, config)
        for files in stages:
            check_alike(files)
            for key in files[0].tensors:
                if not key.endswith(BUFFER):
                    self._add(files, key, shapes, replicas)
        self.shapes = {name: shape for name, shape in shapes.items() if name != HEAD or not self._tied}
        missing = [name for name in self.shapes if name not in self._parts]
        if missing:
            raise ValueError(
                f"{directory}: {len(missing)} of the config's weights are missing, first {missing[0]}"
            )
        self._key_groups = self._find_key_groups(replicas)

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether the directory, or its `model`, holds files or directories named by rank."""
        return any(
            RANK.fullmatch(path.name)
            for folder in (Path(directory), Path(directory) / "model")
            if folder.is_dir()
            for path in folder.iterdir()
        )

    def dtype(self, name: str) -> torch.dtype:
        """The weight's dtype in the files."""
        return self._parts[name].dtype

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive bands of rows, each at most 32 MB or one row: [rows, columns], or [rows] of a norm.

        Raises ValueError where the replicas of norms or KV heads differ, or a tied head from the embedding.
        """
        tied = self._stream(HEAD) if name == EMBEDDING and self._tied and HEAD in self._parts else None
        for band in self._stream(name):
            if tied and not same_bits(band, next(tied)):
                path = self._parts[HEAD].files[0].path
                raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}, and the config ties them")
            yield band

    def _kv_replicas(self, stages: list[list[RankFile]], config: ModelConfig) -> int:
        """How many ranks hold each KV head. Only qkv_proj.* replicates heads, and only whole ones."""
        heads = config.num_key_value_heads
        fused = any(".qkv_proj." in key for files in stages for key in files[0].tensors)
        if fused and self._tp % heads == config.num_attention_heads % self._tp == 0:
            return self._tp // heads
        return 1

    def _add(
        self, files: list[RankFile], key: str, shapes: dict[str, tuple[int, ...]], replicas: int
    ) -> None:
        """Note which weights are in `key`; raises ValueError unless the config has them, in that shape."""
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
                f"{path}: {key} is {list(held)} on each of {self._tp} tensor parallel ranks; the config's "
                f"whole is {wholes}: is a rank's file missing?"
            )
        start = 0
        for name, height in zip(names, map(int, heights), strict=True):
            if name in self._parts:
                other = self._parts[name]
                raise ValueError(
                    f"{path}: {key} holds {name}, and so does {other.key} of {other.files[0].path.name}"
                )
            self._parts[name] = WeightParts(shapes[name], dtype, files, key, start, start + height)
            start += height

    def _find_key_groups(self, replicas: int) -> list[tuple[int, ...]]:
        """The ranks that hold each slice of the KV heads.

        Only the values tell whether they are placed as on Trainium 1 or as on Trainium 2. Raises ValueError
        where both or neither can be.
        """
        slices = self._tp // replicas
        strided = [tuple(range(number, self._tp, slices)) for number in range(slices)]
        neighbours = [tuple(range(number * replicas, (number + 1) * replicas)) for number in range(slices)]
        if strided == neighbours:
            return strided
        parts = self._parts["model.layers.0.self_attn.k_proj.weight"]
        agreeing = [
            groups
            for groups in (strided, neighbours)
            if all(parts.same(group[0], rank) for group in groups for rank in group[1:])
        ]
        if len(agreeing) != 1:
            problem = "all KV heads are the same" if agreeing else "the replicas of KV heads differ"
            raise ValueError(
                f"{parts.files[0].path.parent}: {problem} in {parts.key}: which rank holds which heads is "
                "not known"
            )
        return agreeing[0]

    def _groups(self, name: str) -> list[tuple[int, ...]]:
        """For each slice of the weight, in order, the ranks that hold it."""
        if name.endswith(NORM):
            return [tuple(range(self._tp))]
        if name.endswith(KEYS):
            return self._key_groups
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            return [(rank,) for group in self._key_groups for rank in group]
        return [(rank,) for rank in range(self._tp)]

    def _stream(self, name: str) -> Iterator[torch.Tensor]:
        """The weight in bands, assembled from its slices; raises ValueError where replicas differ."""
        parts, groups = self._parts[name], self._groups(name)
        if name.endswith(COLUMNS):
            for rows in parts.bands:
                yield torch.cat([parts.files[rank].read(parts.key, rows) for (rank,) in groups], dim=1)
            return
        for files in ([parts.files[rank] for rank in group] for group in groups):
            for rows in parts.bands:
                band = files[0].read(parts.key, rows)
                for file in files[1:]:
                    if not same_bits(band, file.read(parts.key, rows)):
                        raise ValueError(
                            f"{file.path}: {parts.key} differs from its replica in {files[0].path.name}"
                        )
                yield band
