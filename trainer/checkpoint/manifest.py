"""The manifest of a checkpoint: what each file holds, put together from the headers of the ranks' files."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from data.loader import Position
from model.weights.hub import read_json
from model.weights.safetensors_file import TensorFile, checksum
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
    manifest = json.loads(json.dumps(manifest))  # as a reader will have it
    return manifest | {"checksum": manifest_checksum(manifest)}


def describe_tensors(directory: Path, writers: Iterable[int]) -> tuple[dict, dict]:
    """(tensors, files) of the manifest, from the headers of the files that the ranks `writers` wrote.

    Raises RuntimeError where replicas of a slice differ, and NonFinite for values that are not finite.
    """
    tensors, files, pieces, places = {}, {}, {}, {}
    for rank in writers:
        path = directory / rank_file(rank)
        file = TensorFile(path)
        files[path.name] = {"bytes": path.stat().st_size, "checksum": file.header_checksum}
        for key, values in json.loads(file.metadata["shards"]).items():
            piece = (key, values["index"], values["first"])
            here = rank, values["checksums"]
            first_rank, known = pieces.setdefault(piece, here) if values["replicas"] > 1 else here
            if known != values["checksums"]:
                raise RuntimeError(
                    f"{key} of rank {rank} is not that of rank {first_rank}, whose replica it is: what they "
                    f"compute has diverged, and {directory.name} stays incomplete"
                )
            if values.get("nonfinite"):
                raise NonFinite(
                    f"{directory.name.removesuffix(INCOMPLETE)} is not saved: {key} has values that are not "
                    "finite (NaN or infinite); the checkpoints before it are kept"
                )
            tensor = tensors.setdefault(
                key,
                {each: values[each] for each in ("global_shape", "dim", "parts", "replicas")}
                | {"dtype": "F32", "piece": 1},
            )
            slices = places.setdefault(key, [[] for _ in range(values["parts"])])
            if key in file.entries:
                slices[values["index"]].append((values["first"], rank))
                tensor["piece"] = max(tensor["piece"], file.entries[key].numel)
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


def describe_files(directory: Path, rank_files: dict) -> dict:
    """`rank_files`, and after them the size and checksum of every other file in the directory."""
    files = dict(rank_files)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
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
