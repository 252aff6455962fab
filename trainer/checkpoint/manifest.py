"""The manifest of a checkpoint: what each file holds, put together from the headers of the ranks' files."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from data.loader import Position
from model.weights.hub import read_json
from model.weights.safetensors_file import checksum
from parallel.mesh import Mesh
from trainer.checkpoint.names import (
    FORMAT,
    INCOMPLETE,
    MANIFEST,
    VERSION,
    NonFinite,
    manifest_checksum,
    rank_file,
)

THREADS, AHEAD = 8, 64  # that read headers, and how many of them


def build_manifest(
    job, mesh: Mesh, position: Position, eval_loss: float | None, tensors: dict, files: dict
) -> dict:
    """The manifest with its checksum; describe_tensors and describe_files make `tensors` and `files`."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": position.step,
        "position": {"epoch": position.epoch, "row": position.row},
        "eval_loss": _finite(eval_loss),
        "world_size": mesh.world_size,
        "tensor_parallel_size": mesh.tp.size(),
        "pipeline_parallel_size": mesh.pp.size(),
        "data_parallel_size": mesh.dp.size(),
        "identity": job.identity,
        "model": job.model_reference,
        "random_seed": job.config.random_seed,
        "config": asdict(job.config),
        "local_datasets": [name for name in job.config.datasets if os.path.exists(name)],
        "files": files,
        "tensors": tensors,
    }
    return manifest | {"checksum": manifest_checksum(manifest)}


def describe_tensors(directory: Path, writers: Sequence[int]) -> tuple[dict, dict]:
    """(tensors, files) of the manifest, from the headers of the files that the ranks `writers` wrote.

    Raises RuntimeError where replicas of a slice differ, and NonFinite for values that are not finite.
    """
    tensors, files, replicas, places = {}, {}, {}, {}
    for header in _read_headers(directory, writers):
        files[header.name] = {"bytes": header.size, "checksum": checksum(header.content)}
        shards, stored = header.parse()
        for key, values in shards.items():
            if values["replicas"] > 1:
                piece, here = (key, values["index"], values["first"]), (header.rank, values["checksums"])
                first_rank, known = replicas.setdefault(piece, here)
                if known != values["checksums"]:
                    raise RuntimeError(
                        f"{key} of rank {header.rank} is not that of rank {first_rank}, whose replica it is: "
                        f"what they compute has diverged, and {directory.name} stays incomplete"
                    )
            if values.get("nonfinite"):
                raise NonFinite(
                    f"{directory.name.removesuffix(INCOMPLETE)} is not saved: {key} has values that are not "
                    "finite (NaN or infinite); the checkpoints before it are kept"
                )
            if key not in tensors:
                tensors[key] = {each: values[each] for each in ("global_shape", "dim", "parts", "replicas")}
                tensors[key] |= {"dtype": "F32", "piece": 1}
                places[key] = [[] for _ in range(values["parts"])]
            if key in stored:
                places[key][values["index"]].append((values["first"], header.rank))
                tensors[key]["piece"] = max(tensors[key]["piece"], stored[key])
    for key, slices in places.items():
        tensors[key]["ranks"] = [_runs([rank for _, rank in sorted(each)]) for each in slices]
    return tensors, files


def _runs(ranks: list[int]) -> list[list[int]]:
    """The ranks in their order as few [start, stop, step], the arguments of Python's range."""
    runs = []
    for rank in ranks:
        start, stop, step = runs[-1] if runs else (rank, rank, 1)
        if stop == start + 1 and rank > start:
            runs[-1] = [start, rank + 1, rank - start]
        elif runs and rank == stop - 1 + step:
            runs[-1][1] = rank + 1
        else:
            runs.append([rank, rank + 1, 1])
    return runs


@dataclass(frozen=True)
class _Header:
    """The header of the file of a rank, which has `size` bytes."""

    rank: int
    name: str
    size: int
    content: bytes

    def parse(self) -> tuple[dict[str, dict], dict[str, int]]:
        """(what the rank holds of each key, the elements of each key that are stored in its file); raises
        OSError where the file is shorter than it should be."""
        stored = json.loads(self.content)
        shards = json.loads(stored.pop("__metadata__")["shards"])
        end = max((values["data_offsets"][1] for values in stored.values()), default=0)
        if self.size != 8 + len(self.content) + end:
            raise OSError(f"{self.name} has {self.size} bytes of {8 + len(self.content) + end}")
        return shards, {key: values["shape"][0] for key, values in stored.items()}


def _read_headers(directory: Path, writers: Sequence[int]) -> Iterator[_Header]:
    """The headers of the ranks' files, in their order.

    Threads read some files ahead: where they are on a network, each takes some milliseconds to open.
    """

    def read(rank):
        with open(directory / rank_file(rank), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Header(rank, rank_file(rank), size, file.read(int.from_bytes(file.read(8), "little")))

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(writers), AHEAD):  # a header has 0.3 MB: not all of them in memory
            yield from pool.map(read, writers[first : first + AHEAD])


def describe_files(directory: Path, rank_files: dict) -> dict:
    """`rank_files`, and after them the size and checksum of every other file in the directory."""
    files = dict(rank_files)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in files and path.is_file():
            files[name] = {"bytes": path.stat().st_size, "checksum": checksum(path.read_bytes())}
    return files


def read_eval_loss(checkpoint: Path) -> float | None:
    """The evaluation loss in a checkpoint's manifest; None where it has none, or is damaged."""
    try:
        return _finite(read_json(checkpoint / MANIFEST).get("eval_loss"))
    except (ValueError, TypeError):  # a damaged checkpoint is no reason not to save another
        return None


def _finite(loss: float | None) -> float | None:
    """The loss, or None where it is no finite number: JSON has no NaN, and a NaN is never the best loss."""
    return loss if loss is not None and math.isfinite(loss) else None
