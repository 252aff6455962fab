"""Saving checkpoints in the background, complete or not at all; the format is docs/checkpoint-format.md.

Every rank that holds part of the state writes a file of its own, in a thread, from a copy on the host. Rank 0
waits for the files of the others, writes the manifest and gives the directory its name. The ranks may be
processes on several nodes: they coordinate by the files in the output directory, without the device.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path

import numpy as np
import torch

from data.loader import Position
from model.weights.safetensors_file import TensorWriter, as_bytes, checksums, is_finite
from parallel.mesh import Mesh
from parallel.runtime import Runtime, meet
from parallel.shard import Shard
from trainer.checkpoint.late_files import LateFiles
from trainer.checkpoint.manifest import build_manifest, describe_files, describe_tensors
from trainer.checkpoint.names import CHUNK, INCOMPLETE, KINDS, MANIFEST, NonFinite, rank_file
from trainer.checkpoint.old_checkpoints import OldCheckpoints, tidy_up
from trainer.reference import write_reference
from trainer.reporting.console import say

MODEL_FILES = ("config.json", "generation_config.json")
WAIT_SECONDS = 30  # for the last save at the next one, before that is put off
ALONE_SECONDS = 60.0  # after which a rank whose directory is missing ends the run, if no other one has
REMOVALS = 3
SAVE_SECONDS = 30.0  # the assumed duration of a save, until one was measured


class Saver:
    """Saves the state of a run, one checkpoint at a time.

    Every rank has a Saver and calls its methods at the same steps. `stalled` is the number of seconds for
    which saves have held up training since the last call of `saves_after`.
    """

    def __init__(
        self, runtime: Runtime, mesh: Mesh, job, optimizer, reference: dict[str, np.ndarray] | None = None
    ):
        """reference: what trainer.reference.add_reference returned."""
        self.runtime, self.mesh, self.job, self.optimizer = runtime, mesh, job, optimizer
        self._reference = reference
        self._output = Path(job.config.output_dir)
        self._partial: Path | None = None  # the directory of the last save, while it was written
        self._late: LateFiles | None = None
        self._written = self._completed = None
        self._put_off, self._missed = False, None
        self._begun = self.stalled = 0.0
        self._seconds = SAVE_SECONDS
        self._old = OldCheckpoints(self._output, job.config.save_total_limit)
        if runtime.rank == 0 and runtime.executes:
            tidy_up(self._output, job.resume.step if job.resume else 0)

    @property
    def seconds(self) -> float:
        """The duration of a save, as rank 0 knows it: of the last one, or so far of the one that is being
        written, whichever is more."""
        if self._completed is None or self._completed.done():
            return self._seconds
        return max(self._seconds, time.perf_counter() - self._begun)

    def saves_after(self, step: int, must: bool) -> bool:
        """Whether a save follows the 1-based `step`; the same on all ranks. `must`: the run ends here.

        To be called after each step. A save is due every --save_steps. Where the one before is then not
        complete, because a rank is slow, the host waits for WAIT_SECONDS at most; after that the save is put
        off to the first later step at which the one before is complete. Raises as `check`.
        """
        self.stalled = 0.0
        self.check()
        due = must or self._put_off or step % self.job.config.save_steps == 0
        if not due or must or self._partial is None:
            return due
        begun, waits = time.perf_counter(), not self._put_off
        # Ranks see files and threads of their own: rank 0 decides, and the others wait for it.
        self._put_off = not self.runtime.share(self.runtime.rank == 0 and self._is_complete(step, waits))
        if waits:
            self.stalled = time.perf_counter() - begun
        return not self._put_off

    def _is_complete(self, step: int, waits: bool) -> bool:
        """On rank 0: whether the last save is complete. Where it `waits`, a warning says if not."""
        wait([self._written, self._completed], WAIT_SECONDS if waits else 0, FIRST_EXCEPTION)
        self.check()
        complete = self._completed.done()
        if waits and not complete:
            say(
                f"warning: the save after step {step} is put off, and training goes on: "
                f"{self._partial.name} is not complete, {self._late}",
                sys.stderr,
            )
        return complete

    def save(self, position: Position, eval_loss: float | None = None) -> None:
        """Start writing `OUT/checkpoint-<step>`: the state before the step of `position`, after a mark_step.

        The host waits for the previous save and for the device. On return, the host has a copy of the state.
        Raises the error of the previous save, where that failed. Does nothing where no graph is executed.
        """
        if not self.runtime.executes:
            return
        stalled = time.perf_counter()
        self.wait()
        self._begun = time.perf_counter()
        self._partial = partial = self._output / f"checkpoint-{position.step}{INCOMPLETE}"
        if self.runtime.rank == 0:
            partial.mkdir(parents=True)
        self.runtime.barrier()
        if self.runtime.rank in self._writers:
            kinds = (self.optimizer.weights, self.optimizer.exp_avg, self.optimizer.exp_avg_sq)
            state = [[value.to("cpu", copy=True) for value in each] for each in kinds]
            self._written = _in_background(lambda: self._write(partial, state))
        if self.runtime.rank == 0:
            owner, begun = threading.current_thread(), self._begun
            self._late = LateFiles(partial, self._writers, meet().name_of)
            self._completed = _in_background(
                lambda: self._complete(partial, position, eval_loss, owner, begun)
            )
        self.stalled += time.perf_counter() - stalled

    def wait(self) -> None:
        """Wait until the last save is complete on all ranks; raises as `check`."""
        self.runtime.progress.at("saving", slow=True)
        for future in (self._written, self._completed):
            if future:
                wait([future])
                self.check()
            self.runtime.barrier()
        self._written = self._completed = None

    def check(self) -> None:
        """Raise the error of the last save, where it has failed on this rank, and delete what it has written.

        A run ends as soon as a checkpoint could not be written. Of the other ranks, which then lack the
        directory, only the first error counts: theirs does where the run has not ended ALONE_SECONDS later.
        """
        for future in (self._written, self._completed):
            error = future.exception() if future and future.done() else None
            if error and (future is self._completed or self._partial.exists() or self._is_alone()):
                for _ in range(REMOVALS):  # another rank may be making a file in it
                    shutil.rmtree(self._partial, ignore_errors=True)
                if isinstance(error, OSError):
                    raise OSError(
                        f"{self._partial} could not be written: {error}; the checkpoints before it are whole"
                    )
                raise error

    def _is_alone(self) -> bool:
        """Whether the directory has been missing for so long that no other rank's error can be the reason. On
        a machine that does not share --output_dir with the others it is never there."""
        self._missed = self._missed or time.monotonic()
        return time.monotonic() - self._missed > ALONE_SECONDS

    @property
    def _writers(self) -> list[int]:
        """The ranks that write a file."""
        return writers(self.mesh, self.optimizer.buckets.parts > 1)

    def _write(self, partial: Path, state: list[list[torch.Tensor]]) -> None:
        """Write this rank's file: the pieces that it stores, and a description of all that it holds.

        `state` has the rank's part of each bucket for each of KINDS. Of the tensor parallel ranks that hold
        the same slice, the first stores it; the others have only its checksum in their description.
        """
        buckets, stored, described = self.optimizer.buckets, {}, {}
        for kind, values in zip(KINDS, state, strict=True):
            for name, shard in buckets.shards.items():
                if shard.padding:
                    continue
                piece, first = buckets.own_piece(name, values)
                if not len(piece):
                    continue
                key = f"{kind}/{name}"
                described[key] = self._describe(shard, first, piece)
                if self.mesh.tp.rank() % described[key]["replicas"] == 0:
                    stored[key] = (name, values, len(piece))
        file = partial / rank_file(self.runtime.rank)
        unfinished = file.with_name(file.name + ".partial")
        writer = TensorWriter(
            unfinished,
            {key: (torch.float32, (length,)) for key, (_, _, length) in stored.items()},
            {"shards": json.dumps(described, separators=(",", ":"))},
        )
        for key, (name, values, _) in stored.items():  # pieces are copies: one at a time is in memory
            writer.write(key, buckets.own_piece(name, values)[0].float())
        writer.close()
        os.rename(unfinished, file)

    def _describe(self, shard: Shard, first: int, piece: torch.Tensor) -> dict:
        """What the rank's file says of a piece that begins at element `first` of the flattened slice."""
        return {
            "global_shape": shard.global_shape,
            "dim": shard.dim,
            "parts": shard.parts,
            "index": shard.index,
            "replicas": replicas_of(shard, self.mesh.tp.size()),
            "first": first,
            "checksums": checksums(as_bytes(piece.float()), 4 * CHUNK),
        } | ({} if is_finite(piece) else {"nonfinite": True})

    def _complete(
        self,
        partial: Path,
        position: Position,
        eval_loss: float | None,
        owner: threading.Thread,
        begun: float,
    ) -> None:
        """Rank 0's part: wait for all files, add the model's files and the manifest, rename the directory.

        `begun` is the time.perf_counter() at which the save started; `owner` the thread that trains.
        """
        if not self._late.wait(owner, begun):
            return
        for name in MODEL_FILES:
            if (self.job.model_directory / name).is_file():
                shutil.copyfile(self.job.model_directory / name, partial / name)
        self.job.tokenizer.save_pretrained(partial)
        self.job.prompt_format.write(partial)
        write_reference(self._reference, partial)
        try:
            tensors, rank_files = describe_tensors(partial, self._writers)
        except NonFinite as error:  # it must not take the place of a good one
            if self.job.config.on_nonfinite != "ignore":
                raise
            print(f"warning: {error}", file=sys.stderr)
            shutil.rmtree(partial)
            return
        files = describe_files(partial, rank_files)
        manifest = build_manifest(self.job, self.mesh, position, eval_loss, tensors, files)
        (partial / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")
        for path in [*sorted(partial.rglob("*")), partial]:
            if path.name not in rank_files:  # each rank has waited until its own is on disk
                _flush(path)
        complete = partial.with_name(partial.name.removesuffix(INCOMPLETE))
        os.rename(partial, complete)
        _flush(partial.parent)
        self._old.prune(complete, manifest["eval_loss"])
        self._seconds = time.perf_counter() - begun


def writers(mesh: Mesh, zero_1: bool) -> list[int]:
    """The ranks that write a file: data parallel ranks hold the same state, except under ZeRO-1."""
    return list(range(mesh.world_size)) if zero_1 else mesh.model.replica_groups[0]


def replicas_of(shard: Shard, tensor_parallel_size: int) -> int:
    """How many tensor parallel ranks hold the same slice. The first of each such group stores it."""
    return tensor_parallel_size if shard.dim is None else shard.replicas


def _in_background(work: Callable[[], None]) -> Future:
    """Run `work()` in a thread that does not outlive the program; the Future has its error."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)  # ends the run: Saver.check

    threading.Thread(target=run, daemon=True).start()
    return future


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
