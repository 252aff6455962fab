"""Checkpoints that trainer.checkpoint.writer saves, with a thread per rank and the CPU as every device."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from data.loader import Position
from parallel.buckets import Buckets
from parallel.mesh import Mesh
from parallel.runtime import LockstepBarrier, ThreadRuntime
from parallel.shard import Shard
from trainer.checkpoint.manifest import describe_files
from trainer.checkpoint.names import KINDS, MANIFEST, manifest_checksum
from trainer.checkpoint.writer import Saver
from trainer.config import Config
from trainer.config_derived import SAMPLE
from trainer.optimizer import AdamW
from trainer.prompts import PromptFormat
from trainer.tokenizer import load_tokenizer

SHAPES = {"column.weight": ((8, 6), 0), "row.weight": ((6, 8), 1), "norm.weight": ((6,), None)}
IDENTITY = {"model": "tiny", "lora": None, "seed": 1}


def whole(kind, name, step=1, shapes=SHAPES):
    """The values of a tensor at a step, on every topology."""
    return (
        torch.randn(shapes[name][0], generator=torch.Generator().manual_seed(sum(map(ord, kind + name))))
        * step
    )


def shards_of(mesh, shapes=SHAPES):
    """{name: shard} of a rank. A stage has the parameters of all stages: those of others are padding."""
    size, rank, stages = mesh.tp.size(), mesh.tp.rank(), mesh.pp.size()
    shards = {
        name: Shard(shape, replicas=size) if dim is None else Shard(shape, dim, size, rank)
        for name, (shape, dim) in shapes.items()
    }
    return {
        name: replace(shard, padding=number % stages != mesh.pp.rank())
        for number, (name, shard) in enumerate(shards.items())
    }


def optimizer_of(mesh, step, zero_1=False, shapes=SHAPES, bucket_bytes=80, changed=None, by=1.0):
    """An optimizer with the state of a step (zeros at 0); `by` is added to the parameter `changed`."""
    shards = shards_of(mesh, shapes)
    trained = [(name, torch.nn.Parameter(torch.zeros(shard.shape)), shard) for name, shard in shards.items()]
    buckets = Buckets(trained, mesh, zero_1, bucket_bytes)
    values = {
        kind: {
            name: whole(kind, name, step, shapes)[shard.slices]
            + by * (kind == "parameter" and name == changed)
            for name, shard in shards.items()
        }
        for kind in KINDS
    }
    return AdamW(buckets, Config(), [buckets.own(values[kind]) for kind in KINDS])


def resume_all(checkpoint, meshes, zero_1=False):
    """The optimizers of all ranks as a checkpoint has them: each reads its share, and all gather."""
    optimizers = [optimizer_of(mesh, 0, zero_1) for mesh in meshes]
    return give_shares(optimizers, [checkpoint.part(optimizer.buckets) for optimizer in optimizers])


def give_shares(optimizers, parts):
    """The gathers of parallel/buckets.py, without a device: every rank's part of a checkpoint is here."""
    buckets = [optimizer.buckets for optimizer in optimizers]
    for kind, name in enumerate(("weights", "exp_avg", "exp_avg_sq")):
        for number, _ in enumerate(buckets[0].buckets):
            values = [part.shares[kind][number] for part in parts]
            for groups in zip(*(each.holders(each.buckets[number]) for each in buckets), strict=True):
                values = [
                    torch.cat([values[other] for other in members], 1)
                    for members in map(members_of, groups, range(len(values)))
                ]
            for optimizer, value in zip(optimizers, values, strict=True):
                state = getattr(optimizer, name)
                assert state[number].shape[1] <= value.shape[1]
                state[number] = value[:, : state[number].shape[1]]
    return optimizers


def members_of(group, rank):
    """The ranks of the rank's own group."""
    return [rank] if group.size() == 1 else next(each for each in group.replica_groups if rank in each)


def save(
    output,
    *steps,
    tp=2,
    dp=2,
    pp=1,
    limit=None,
    zero_1=False,
    losses=(),
    change=None,
    identity=IDENTITY,
    model=None,
    on_nonfinite="end",
    **state,
):
    """Save the states of `steps` of the tiny model, or of the one in the directory `model`.

    `change(rank, optimizer)` may spoil a state before it is saved. Returns the last checkpoint's directory.
    """
    directory = model or SAMPLE / "tiny"
    config = replace(
        Config(),
        model_id=model and str(model),
        output_dir=str(output),
        save_total_limit=limit,
        zero_1=zero_1,
        on_nonfinite=on_nonfinite,
    )
    job = SimpleNamespace(
        config=config,
        model_directory=directory,
        tokenizer=TOKENIZER,
        identity=identity,
        prompt_format=PromptFormat.of("instruction"),
        model_reference=str(model or "tiny"),
        resume=SimpleNamespace(step=steps[0] - 1),
    )
    barrier = LockstepBarrier(tp * dp * pp)

    def rank_saves(rank):
        mesh = Mesh.create(rank, tp * dp * pp, tp, pp)
        saver = None
        try:
            for number, step in enumerate(steps):
                optimizer = optimizer_of(mesh, step, zero_1, **state)
                if change:
                    change(rank, optimizer)
                saver = saver or Saver(
                    ThreadRuntime(rank, tp * dp * pp, torch.device("cpu"), barrier), mesh, job, optimizer
                )
                saver.optimizer = optimizer
                saver.save(Position(step, 1, 3), dict(enumerate(losses)).get(number))
            saver.wait()
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(tp * dp * pp) as pool:
        for future in [pool.submit(rank_saves, rank) for rank in range(tp * dp * pp)]:
            future.result()
    return output / f"checkpoint-{steps[-1]}"


def forge(checkpoint, change):
    """Apply `change(manifest)`, which may return another one, to a manifest, and make its checksum fit."""
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text())
    manifest = change(manifest) or manifest
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


def as_version_3(checkpoint):
    """Rewrite a checkpoint as version 3 had it: one checksum a piece, each piece listed in the manifest."""
    pieces = {}
    for path in sorted(checkpoint.glob("rank-*")):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dictionary)
            described = json.loads(file.metadata()["shards"])
        for key, values in described.items():
            del values["checksums"]
            if key in tensors:
                values["checksum"] = xxhash.xxh3_128_hexdigest(tensors[key].numpy().tobytes())
                piece = {"first": values["first"], "checksum": values["checksum"], "file": path.name}
                pieces.setdefault((key, values["index"]), []).append(piece)
            else:  # a replica's
                values["checksum"] = next(
                    piece["checksum"]
                    for piece in pieces[key, values["index"]]
                    if piece["first"] == values["first"]
                )
        save_file(tensors, path, metadata={"shards": json.dumps(described)})

    def change(manifest):
        manifest["version"] = 3
        for key, values in manifest["tensors"].items():
            del values["piece"], values["ranks"]
            found = [pieces.get((key, index), []) for index in range(values["parts"])]
            values["slices"] = [sorted(each, key=lambda piece: piece["first"]) for each in found]
        for path in checkpoint.glob("rank-*"):
            content = path.read_bytes()
            header = content[8 : 8 + int.from_bytes(content[:8], "little")]
            listed = {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(header)}
            manifest["files"][path.name] = listed

    forge(checkpoint, change)
    return checkpoint


def list_files(checkpoint):
    """Let the manifest list all files as they are now."""

    def change(manifest):
        (checkpoint / MANIFEST).unlink()
        ranks = {name: each for name, each in manifest["files"].items() if name.startswith("rank-")}
        manifest["files"] = describe_files(checkpoint, ranks)

    forge(checkpoint, change)


TOKENIZER = load_tokenizer(SAMPLE / "tiny")
