"""Checkpoints, written: behind the training's back, complete or not at all. CHECKPOINT_FORMAT.md describes
the directory.

Every rank that has something to say writes its own file, in a thread, from a copy on the host; rank 0 waits
for the files of the others, writes the manifest and gives the directory its name. Ranks may be processes on
several nodes: they meet in the output directory, and on the device for nothing.
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import torch

from data.loader import Position
from model.weights.hub import read_json
from model.weights.safetensors_file import TensorFile, TensorWriter, as_bytes, checksum
from parallel.mesh import Mesh
from parallel.runtime import Runtime
from trainer.checkpoint.names import (
    FORMAT,
    INCOMPLETE,
    KINDS,
    MANIFEST,
    VERSION,
    list_checkpoints,
    manifest_checksum,
)

MODEL_FILES = ("config.json", "generation_config.json")
SHARD = ("global_shape", "dim", "parts", "index")  # what the files say of a Shard
POLL_SECONDS, PATIENCE_SECONDS = 0.02, 3600  # of rank 0, while the others write
SAVE_SECONDS = 30.0  # what a save is taken to need, until one was measured


class Saver:
    """Saves the state of a run, one checkpoint at a time.

    `stalled`: for how many seconds the last `save` held up training; `seconds`: how long the last one took in
    all.

    Every rank has one, and calls its methods at the same steps.
    """

    def __init__(self, runtime: Runtime, mesh: Mesh, job, optimizer):
        self.runtime, self.mesh, self.job, self.optimizer = runtime, mesh, job, optimizer
        self._output = Path(job.config.output_dir)
        self._written = self._completed = None
        self.stalled, self.seconds = 0.0, SAVE_SECONDS
        if runtime.rank == 0 and runtime.executes:
            for path in self._output.glob("checkpoint-*" + INCOMPLETE):  # of a run that was killed
                shutil.rmtree(path)
            for step, path in list_checkpoints(self._output):
                if step > (job.resume.step if job.resume else 0):  # damaged: --resume latest has skipped it
                    _set_aside(path)

    def save(self, position: Position, eval_loss: float | None = None) -> None:
        """Begin `OUT/checkpoint-<step>`, the state before the step of `position`. Called after a mark_step.

        The host waits for the save before this one, and for the device; then what is saved is on the host.
        Raises the OSError of the save before, where that failed. Nothing is saved where nothing is executed.
        """
        if not self.runtime.executes:
            return
        begun = time.perf_counter()
        self.wait()
        copying = time.perf_counter()
        partial = self._output / f"checkpoint-{position.step}{INCOMPLETE}"
        if self.runtime.rank == 0:
            partial.mkdir(parents=True)
        self.runtime.barrier()
        if self._writes:
            kinds = (self.optimizer.weights, self.optimizer.exp_avg, self.optimizer.exp_avg_sq)
            state = [[value.to("cpu", copy=True) for value in each] for each in kinds]
            self._written = _in_background(partial, lambda: self._write(partial, state))
        if self.runtime.rank == 0:
            owner = threading.current_thread()
            self._completed = _in_background(
                partial, lambda: self._complete(partial, position, eval_loss, owner, copying)
            )
        self.stalled = time.perf_counter() - begun

    def wait(self) -> None:
        """Wait until the save that was begun is complete, on all ranks; raises the error that prevented it."""
        for future in (self._written, self._completed):
            if future:
                future.result()
            self.runtime.barrier()
        self._written = self._completed = None

    @property
    def _writes(self) -> bool:
        # Data parallel ranks hold the same, but for the parts that ZeRO-1 gives them.
        return self.mesh.dp.rank() == 0 or self.optimizer.buckets.parts > 1

    def _file(self, rank: int) -> str:
        return f"rank-{rank:05d}.safetensors"

    def _write(self, partial: Path, state: list[list[torch.Tensor]]) -> None:
        """This rank's file: its pieces of what it holds as the first of the replicas; of the rest, the
        checksums."""
        buckets, mesh, own, described = self.optimizer.buckets, self.mesh, [], {}
        for kind, values in zip(KINDS, state, strict=True):
            for name, shard in buckets.shards.items():
                if shard.padding:
                    continue
                piece, first = buckets.own_piece(name, values)
                if not len(piece):
                    continue
                piece, key = piece.float(), f"{kind}/{name}"
                replicas = (
                    mesh.tp.size() if shard.dim is None else shard.replicas
                )  # neighbours that hold the same
                described[key] = {each: getattr(shard, each) for each in SHARD} | {
                    "replicas": replicas,
                    "first": first,
                    "checksum": checksum(as_bytes(piece)),
                }
                if mesh.tp.rank() % replicas == 0:
                    own.append((key, name, values, len(piece)))
        file = partial / self._file(self.runtime.rank)
        hidden = file.with_name(file.name + ".partial")
        writer = TensorWriter(
            hidden,
            {key: (torch.float32, (length,)) for key, _, _, length in own},
            {"shards": json.dumps(described)},
        )
        for key, name, values, _ in own:
            writer.write(
                key, buckets.own_piece(name, values)[0].float()
            )  # all at once would be a second copy
        writer.close()
        os.rename(hidden, file)

    def _complete(
        self,
        partial: Path,
        position: Position,
        eval_loss: float | None,
        owner: threading.Thread,
        begun: float,
    ) -> None:
        """Once all files are there: the model's own files, the manifest, the name; then the checkpoints that
        are too many go."""
        mesh, job = self.mesh, self.job
        writers = range(mesh.world_size) if self.optimizer.buckets.parts > 1 else mesh.model.replica_groups[0]
        while missing := [rank for rank in writers if not (partial / self._file(rank)).exists()]:
            if not owner.is_alive():  # another rank's error has ended the run
                return
            if time.perf_counter() - begun > PATIENCE_SECONDS:
                raise OSError(
                    f"{self._file(missing[0])} has not come in {PATIENCE_SECONDS} s: do all nodes share the directory?"
                )
            time.sleep(POLL_SECONDS)
        for name in MODEL_FILES:
            if (job.model_directory / name).is_file():
                shutil.copyfile(job.model_directory / name, partial / name)
        job.tokenizer.save_pretrained(partial)
        job.prompt_format.write(partial)
        tensors, files = self._collect(partial, writers)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in files:
                files[name] = {"bytes": path.stat().st_size, "checksum": checksum(path.read_bytes())}
            _flush(path)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": position.step,
            "position": {"epoch": position.epoch, "row": position.row},
            "eval_loss": finite(eval_loss),
            "world_size": mesh.world_size,
            "tensor_parallel_size": mesh.tp.size(),
            "pipeline_parallel_size": mesh.pp.size(),
            "data_parallel_size": mesh.dp.size(),
            "identity": job.identity,
            "model": job.model_reference,
            "random_seed": job.config.random_seed,
            "config": asdict(job.config),
            "files": files,
            "tensors": tensors,
        }
        manifest = json.loads(json.dumps(manifest))  # as a reader will have it
        text = json.dumps(manifest | {"checksum": manifest_checksum(manifest)}, indent=1)
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        _flush(partial / MANIFEST)
        _flush(partial)
        os.rename(partial, partial.with_name(partial.name.removesuffix(INCOMPLETE)))
        _flush(partial.parent)
        self._prune()
        self.seconds = time.perf_counter() - begun

    def _collect(self, partial: Path, writers: Iterable[int]) -> tuple[dict, dict]:
        """(tensors, files) of the manifest, from the headers of the ranks' files. Raises RuntimeError where
        replicas differ."""
        tensors, files, pieces = {}, {}, {}
        for rank in writers:
            path = partial / self._file(rank)
            file = TensorFile(path)
            files[path.name] = {"bytes": path.stat().st_size, "checksum": file.header_checksum}
            for key, values in json.loads(file.metadata["shards"]).items():
                place = (key, values["index"], values["first"])
                first_rank, known = pieces.setdefault(place, (rank, values["checksum"]))
                if known != values["checksum"]:
                    raise RuntimeError(
                        f"{key} of rank {rank} is not that of rank {first_rank}, whose replica it is: what they "
                        f"compute has diverged, and {partial.name} stays incomplete"
                    )
                tensor = tensors.setdefault(
                    key,
                    {each: values[each] for each in ("global_shape", "dim", "parts", "replicas")}
                    | {"dtype": "F32", "slices": [[] for _ in range(values["parts"])]},
                )
                if key in file.entries:
                    tensor["slices"][values["index"]].append(
                        {each: values[each] for each in ("first", "checksum")} | {"file": path.name}
                    )
        for tensor in tensors.values():
            for slices in tensor["slices"]:
                slices.sort(key=lambda piece: piece["first"])
        return tensors, files

    def _prune(self) -> None:
        """Delete all but the newest --save_total_limit checkpoints, and the one with the least evaluation
        loss.

        What cannot be deleted is no reason to end a run.
        """
        limit = self.job.config.save_total_limit
        present = list_checkpoints(self._output)
        losses = {path: loss for _, path in present if limit and (loss := _eval_loss(path)) is not None}
        best = min(losses, key=losses.get, default=None)
        for _, old in present[:-limit] if limit else []:
            if old != best:
                doomed = old.with_name(
                    old.name + INCOMPLETE
                )  # a half-deleted directory must not look complete
                try:
                    os.rename(old, doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    print(f"warning: {old} cannot be deleted: {error}", file=sys.stderr)


def _in_background(partial: Path, work) -> Future:
    """Run `work()`, a part of writing `partial`, in a thread that does not outlive the program."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:
            if isinstance(error, OSError):
                error = OSError(
                    f"{partial} could not be written: {error}; the checkpoints before it are whole"
                )
            print(f"error: {error}", file=sys.stderr)
            future.set_exception(error)  # which ends the run at the next save

    threading.Thread(target=run, daemon=True).start()
    return future


def _eval_loss(path: Path) -> float | None:
    try:
        return finite(read_json(path / MANIFEST).get("eval_loss"))
    except ValueError:  # a damaged checkpoint is no reason not to save another
        return None


def finite(loss: float | None) -> float | None:
    """The loss, or None where it is no number: JSON has no NaN, and a NaN is no best loss."""
    return loss if loss is not None and math.isfinite(loss) else None


def _set_aside(path: Path) -> None:
    number = 1
    while path.with_name(f"{path.name}.damaged-{number}").exists():
        number += 1
    os.rename(path, path.with_name(f"{path.name}.damaged-{number}"))


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
