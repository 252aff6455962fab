"""What start, save and resume of a job read and write: bytes of a node and of all nodes.

The arithmetic is that of the code: the shards of each rank's model (parallel/shard.py), ZeRO-1's parts
(parallel/buckets.py), the ranks that write, and what they store (trainer/checkpoint/writer.py). What several
ranks of a node read, the node reads once; then it is in the page cache of its memory.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.lora import is_lora
from parallel.buckets import own_range
from parallel.mesh import Mesh
from parallel.shard import named_shards
from tools.graphs.memory import state_of
from tools.graphs.models import rank_model
from tools.graphs.report import rank_0_mesh
from trainer.checkpoint.names import KINDS
from trainer.checkpoint.writer import replicas_of, writers

BASE_ITEM = 2  # bytes of a weight in the base model's files: published models are bf16
TOKEN_BYTES = np.dtype(np.int32).itemsize + np.dtype(np.bool_).itemsize  # data/tokens.py: ids and `trained`
# Of a manifest, as they were counted: bytes of a file, of a tensor (of one kind), and of a piece of it.
FILE_BYTES, TENSOR_BYTES, PIECE_BYTES = 89, 140, 96


@dataclass(frozen=True)
class Moved:
    """Bytes that are read or written: `total` by all nodes, `node` by the one that moves most.

    `asked`: what the ranks of that node ask for; the part beyond `node` comes from its memory.
    """

    total: int
    node: int
    asked: int


@dataclass(frozen=True)
class Storage:
    """What a job reads and writes.

    `base`: at a start, each rank's slices of the base model; `frozen`: those of what is not trained, which a
    resumed run reads; `hashed`: the base model, a share by each rank. `saved` and `resumed`: the tensors of a
    checkpoint. `files`: those of the ranks in it; `largest_file` and `manifest`: bytes, estimated for the
    manifest. `copy`: bytes of a node's memory for the state while it is written.
    """

    base: Moved
    frozen: Moved
    hashed: Moved
    saved: Moved
    resumed: Moved
    files: int
    largest_file: int
    manifest: int
    copy: int


def storage_of(config, model_config, cores: int) -> Storage:
    """What a job of this Config, whose world fills nodes of so many `cores`, reads and writes."""
    mesh = rank_0_mesh(config)
    places = _places(mesh)
    slices = {}  # of (tensor parallel rank, stage); data parallel ranks have the same
    for rank, (tp_rank, dp_rank, stage) in enumerate(places):
        if dp_rank == 0:
            own = Mesh.create(rank, mesh.world_size, mesh.tp.size(), mesh.pp.size())
            slices[tp_rank, stage] = _Slices(config, rank_model(config, model_config, own), own)
    held = [slices[tp_rank, stage] for tp_rank, _, stage in places]
    parts = mesh.dp.size() if config.zero_1 else 1
    stored = {
        rank: held[rank].stored(parts, places[rank][1] if parts > 1 else 0)
        for rank in writers(mesh, parts > 1)
    }
    nodes = [range(first, first + cores) for first in range(0, mesh.world_size, cores)]
    written = [sum(stored[rank][0] for rank in node if rank in stored) for node in nodes]
    whole = {key: size for each in slices.values() for key, size in each.base.items()}
    tensors = len(KINDS) * len({name for each in slices.values() for name in each.trained})
    pieces = sum(count for _, count in stored.values())
    return Storage(
        base=_read([[each.base for each in map(held.__getitem__, node)] for node in nodes]),
        frozen=_read([[each.frozen for each in map(held.__getitem__, node)] for node in nodes]),
        hashed=_shared(sum(whole.values()), len(nodes)),
        saved=Moved(sum(written), max(written), max(written)),
        resumed=_shared(sum(written), len(nodes)),
        files=len(stored),
        largest_file=max(size for size, _ in stored.values()),
        manifest=len(stored) * FILE_BYTES + tensors * TENSOR_BYTES + pieces * PIECE_BYTES,
        copy=max(sum(held[rank].state for rank in node if rank in stored) for node in nodes),
    )


class _Slices:
    """What the ranks of one place in tensor parallelism and pipeline hold.

    `base` and `frozen`: {(name, number of the slice): bytes in the base model's files}. `trained`: names.
    `state`: bytes of weights and moments that are copied for a save.
    """

    def __init__(self, config, model, mesh: Mesh):
        shards = [each for each in named_shards(model) if not each[2].padding]
        read = [] if config.random_weights else [each for each in shards if not is_lora(each[0])]
        self.base = {(name, shard.index): BASE_ITEM * shard.numel for name, _, shard in read}
        self.trained = {name for name, parameter, _ in shards if parameter.requires_grad}
        self.frozen = {key: size for key, size in self.base.items() if key[0] not in self.trained}
        state = state_of(model, config, mesh)
        self.state = state.master_weights + state.moments
        tp = mesh.tp
        kept = (shard for name, _, shard in shards if name in self.trained)
        self._stored = Counter(each for each in kept if tp.rank() % replicas_of(each, tp.size()) == 0)

    def stored(self, parts: int, part: int) -> tuple[int, int]:
        """(bytes of the tensors, their number) in the file of the rank that has this part."""
        lengths = [(own_range(shard, parts, part)[1], count) for shard, count in self._stored.items()]
        size = 4 * len(KINDS) * sum(length * count for length, count in lengths)
        return size, len(KINDS) * sum(count for length, count in lengths if length)


def _places(mesh: Mesh) -> list[tuple[int, int, int]]:
    """(tensor parallel rank, data parallel rank, stage) of each rank."""
    numbers = [
        {rank: number for group in each.replica_groups for number, rank in enumerate(group)}
        for each in (mesh.tp, mesh.dp, mesh.pp)
    ]
    return [tuple(each[rank] for each in numbers) for rank in range(mesh.world_size)]


def _read(nodes: Sequence[Sequence[dict]]) -> Moved:
    """What nodes read whose ranks ask for {slice: bytes} each."""
    once = [sum({key: size for each in node for key, size in each.items()}.values()) for node in nodes]
    asked = [sum(sum(each.values()) for each in node) for node in nodes]
    return Moved(sum(once), max(once), max(asked))


def _shared(total: int, nodes: int) -> Moved:
    """What all ranks read together, each as much as the others."""
    node = -(-total // nodes)
    return Moved(total, node, node)
