"""Checkpoints: `OUT/checkpoint-<step>/`, complete when it has that name.

    manifest.json          format, version, step, position in the data, topology, what makes it this run (identity), where the
                           base model is, flags, bytes of each file
    rank-<n>.safetensors   `parameter/<name>` (master weights), `exp_avg/<name>`, `exp_avg_sq/<name>` of what is trained, fp32,
                           one dimension: elements of the slice of rank n. The metadata entry `shards` says for each tensor
                           which slice (global_shape, dim, parts, index, replicas), and the number of its first element (first)
    config.json, tokenizer files, generation_config.json: the model's, so that a merged model needs no other source for them

Only the ranks of the first data parallel replica write: the others hold the same. Under ZeRO-1 each holds its own part, and all
write. Under LoRA the frozen base is not stored but named in the manifest. Everything is written to `checkpoint-<step>.incomplete`
and renamed at the end.
"""
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.loader import Position
from model.files import read_json
from model.lora import LoraConfig
from parallel.layers import Shard
from parallel.mesh import Mesh
from parallel.runtime import Runtime

FORMAT, VERSION = "markstep checkpoint", 2
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
SHARD = ("global_shape", "dim", "parts", "index", "replicas")     # what the files say of a Shard
MODEL_FILES = ("config.json", "generation_config.json")


class Checkpoint:
    """A complete checkpoint, opened for reading: headers at once, tensors when asked for.

    Raises ValueError where `path` is no checkpoint, or one of its files is missing, truncated or unreadable.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not os.path.isfile(manifest) or self.path.name.endswith(".incomplete"):
            raise ValueError(f"{self.path} is no complete checkpoint: a directory checkpoint-<step> with a manifest.json was "
                             "expected")
        self.manifest = read_json(manifest)
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != VERSION:
            raise ValueError(f"{manifest}: format {self.manifest.get('format')!r} version {self.manifest.get('version')!r}; "
                             f"this program reads {FORMAT!r} version {VERSION}")
        absent = [key for key, kind in (("step", int), ("files", dict), ("identity", dict), ("position", dict))
                  if not isinstance(self.manifest.get(key), kind) or not self.manifest[key]]
        if absent or "lora" not in self.manifest["identity"] or self.manifest["step"] < 1:
            raise ValueError(f"{manifest} is damaged: it has no {absent[0] if absent else 'lora in identity, or a step below 1'}")
        for name, size in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file} is missing: the checkpoint is damaged")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size} bytes of {size}: the checkpoint is truncated")
        self.step: int = self.manifest["step"]
        place = self.manifest["position"]
        self.position = Position(self.step, place.get("epoch"), place.get("row"))
        if not all(isinstance(value, int) and value >= 0 for value in (self.position.epoch, self.position.row)):
            raise ValueError(f"{manifest} is damaged: its position is {place}")
        lora = self.manifest["identity"]["lora"]
        try:
            self.lora = LoraConfig(**lora | {"target_modules": tuple(lora["target_modules"])}) if lora else None
        except (TypeError, KeyError) as error:
            raise ValueError(f"{manifest} is damaged: identity's lora: {error}") from None
        self._slices = self._open()
        # The global shape of each stored parameter.
        self.shapes = {key.removeprefix("parameter/"): slices[0].shard.global_shape for key, slices in self._slices.items()
                       if key.startswith("parameter/")}

    def _open(self) -> dict[str, list["_Slice"]]:
        """`<kind>/<name>` -> every slice of the whole once."""
        found: dict[str, dict[int, _Slice]] = {}
        for name in self.manifest["files"]:
            try:
                file = safe_open(self.path / name, framework="pt")
                described = json.loads(file.metadata()["shards"])
                views = {key: file.get_slice(key) for key in file.keys()}       # noqa: SIM118  (safe_open is not iterable)
                if set(views) != set(described):
                    raise ValueError("its metadata speaks of other tensors than it holds")
                for key, values in described.items():
                    shard = Shard(**{field: values[field] for field in SHARD} | {"global_shape": tuple(values["global_shape"])})
                    (length,) = views[key].get_shape()
                    if views[key].get_dtype() != "F32" or not 0 <= values["first"] <= shard.numel - length:
                        raise ValueError(f"what its metadata says of {key} is not what it holds")
                    here = found.setdefault(key, {}).setdefault(shard.index, _Slice(key, shard))
                    here.pieces.setdefault(values["first"], (length, file))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise ValueError(f"{self.path / name} is damaged: {error}") from None
        for key, slices in found.items():
            parts = next(iter(slices.values())).shard.parts
            if sorted(slices) != list(range(parts)):
                raise ValueError(f"{self.path}: of the {parts} parts of {key}, the files hold {sorted(slices)}")
            for index, each in slices.items():
                if not each.complete():
                    raise ValueError(f"{self.path}: of part {index} of {key}, the files hold only some elements")
        return {key: [slices[index] for index in sorted(slices)] for key, slices in found.items()}

    def read(self, kind: str, name: str, shard: Shard | None = None) -> torch.Tensor:
        """The slice `shard` (default: all) of a parameter or a moment (`kind` of KINDS), fp32, whoever wrote its parts."""
        slices = self._slices[f"{kind}/{name}"]
        for stored in slices:
            if shard is not None and stored.shard.slices == shard.slices:
                return stored.read()
        parts = [stored.read() for stored in slices]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=slices[0].shard.dim)
        return whole if shard is None else whole[shard.slices].clone()

    def check(self, identity: dict) -> None:
        """Raise ValueError unless the checkpoint is of the run that `identity` describes."""
        for key, here in json.loads(json.dumps(identity)).items():
            there = self.manifest["identity"].get(key)
            if there != here:
                raise ValueError(f"{self.path} is of another run: its {key} is {there}, and that of these flags is {here}")

    def check_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold the parameters `expected` (name and global shape), and nothing else."""
        found = {key: slices[0].shard.global_shape for key, slices in self._slices.items()}
        wanted = {f"{kind}/{name}": shape for kind in KINDS for name, shape in expected.items()}
        odd = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        if odd:
            raise ValueError(f"{self.path} is damaged, or of another model: {odd[0]} has shape {found.get(odd[0], 'none')}, and "
                             f"{wanted.get(odd[0], 'none')} was expected")

    def restore(self, optimizer) -> None:
        """Give the optimizer's moments their stored values, in place. (Its weights were read when the model was filled.)"""
        for kind, state in (("exp_avg", optimizer.exp_avg), ("exp_avg_sq", optimizer.exp_avg_sq)):
            values = {name: self.read(kind, name, shard) for name, shard in optimizer.buckets.shards.items()}
            state[:] = [value.to(old.device) for value, old in zip(optimizer.buckets.own(values), state, strict=True)]


@dataclass
class _Slice:
    """A slice of a tensor of the files: its elements in pieces, by the number of the first."""

    key: str
    shard: Shard
    pieces: dict[int, tuple] = field(default_factory=dict)

    def complete(self) -> bool:
        """Whether the pieces follow each other from the first element to the last."""
        end = 0
        for first, (length, _) in sorted(self.pieces.items()):
            if first != end:
                return False
            end += length
        return end == self.shard.numel

    def read(self) -> torch.Tensor:
        pieces = [file.get_tensor(self.key) for _, (_, file) in sorted(self.pieces.items(), key=lambda item: item[0])]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(self.shard.shape)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a directory, oldest first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in names)
    return sorted((int(match[1]), Path(output_dir) / match[0]) for match in matches if match)


def find_checkpoint(output_dir: str, resume: str | None) -> Checkpoint | None:
    """The checkpoint that --resume asks for, or None; ValueError where it is damaged, or another run is in the way.

    What a run leaves in `output_dir` (checkpoints, metrics.jsonl) is gone on with, or stays as it is.
    """
    output = Path(output_dir)
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output_dir {output} is a file: a directory was expected")
    present = list_checkpoints(output)
    if resume == "latest":
        if not present:
            raise ValueError(f"--resume latest: {output} holds no checkpoint-<step>")
        return Checkpoint(present[-1][1])
    checkpoint = None if resume is None else Checkpoint(Path(resume))
    if checkpoint and checkpoint.path.resolve().parent == output.resolve():
        if present and present[-1][0] > checkpoint.step:
            raise ValueError(f"--resume {resume}: {output} holds the later {present[-1][1].name}, which would be overwritten: "
                             "pass --resume latest, or another --output_dir")
        return checkpoint
    left = present[-1][1] if present else output / "metrics.jsonl"
    if os.path.exists(left):
        way_out = "pass --resume latest to go on with it" if present else "move it away"
        raise ValueError(f"--output_dir {output} holds {left.name} of another run: {way_out}, or choose another --output_dir")
    return checkpoint


def save_checkpoint(runtime: Runtime, mesh: Mesh, job, position: Position, optimizer) -> None:
    """Write `OUT/checkpoint-<step>`, the state before the step of `position`.

    Called by every rank after a mark_step. The host waits for the device here.
    """
    final = Path(job.config.output_dir) / f"checkpoint-{position.step}"
    partial = final.with_name(final.name + ".incomplete")
    if runtime.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    runtime.barrier()
    if mesh.dp.rank() == 0 or optimizer.buckets.parts > 1:
        tensors, described = {}, {}
        for kind, state in zip(KINDS, (optimizer.weights, optimizer.exp_avg, optimizer.exp_avg_sq), strict=True):
            on_host = [value.cpu().float() for value in state]
            for name, shard in optimizer.buckets.shards.items():
                values, first = optimizer.buckets.own_piece(name, on_host)
                if len(values):
                    tensors[f"{kind}/{name}"] = values
                    described[f"{kind}/{name}"] = {each: getattr(shard, each) for each in SHARD} | {"first": first}
        file = partial / f"rank-{runtime.rank:05d}.safetensors"
        save_file(tensors, file, metadata={"shards": json.dumps(described)})
        _flush(file)
    runtime.barrier()
    if runtime.rank == 0:
        for name in MODEL_FILES:
            if (job.model_directory / name).is_file():
                shutil.copyfile(job.model_directory / name, partial / name)
        job.tokenizer.save_pretrained(partial)
        manifest = {
            "format": FORMAT, "version": VERSION, "step": position.step,
            "position": {"epoch": position.epoch, "row": position.row}, "world_size": mesh.world_size,
            "tensor_parallel_size": mesh.tp.size(), "data_parallel_size": mesh.dp.size(), "identity": job.identity,
            "model": job.model_reference, "random_seed": job.config.random_seed, "config": asdict(job.config),
            "files": {path.name: path.stat().st_size for path in sorted(partial.glob("rank-*"))}}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(partial / "manifest.json")
        os.rename(partial, final)
        _flush(final.parent)
        present = list_checkpoints(final.parent)
        for _, old in present[:-job.config.save_total_limit] if job.config.save_total_limit else []:
            doomed = old.with_name(old.name + ".incomplete")        # a half-deleted directory must not look complete
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    runtime.barrier()


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
