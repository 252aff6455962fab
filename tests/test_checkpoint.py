"""Checkpoints: written by some ranks, read by others; what is incomplete or damaged is not taken for one."""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.loader import Position
from parallel.buckets import Buckets
from parallel.layers import Shard
from parallel.mesh import Mesh
from parallel.runtime import Meeting, ThreadRuntime
from trainer.checkpoint import KINDS, Checkpoint, find_checkpoint, list_checkpoints, save_checkpoint
from trainer.config import SAMPLE, Config
from trainer.job import load_tokenizer
from trainer.optimizer import AdamW

SHAPES = {"column.weight": ((8, 6), 0), "row.weight": ((6, 8), 1), "norm.weight": ((6,), None)}
IDENTITY = {"model": "tiny", "lora": None, "seed": 1}


def whole(kind, name):
    return torch.randn(SHAPES[name][0], generator=torch.Generator().manual_seed(sum(map(ord, kind + name))))


def shards_of(mesh):
    size, rank = mesh.tp.size(), mesh.tp.rank()
    return {name: Shard(shape, dim, 1 if dim is None else size, 0 if dim is None else rank, size if dim is None else 1)
            for name, (shape, dim) in SHAPES.items()}


def optimizer_of(mesh, filled, zero_1=False):
    shards = shards_of(mesh)
    trained = [(name, torch.nn.Parameter(torch.zeros(shard.shape)), shard) for name, shard in shards.items()]
    buckets = Buckets(trained, mesh, zero_1, bucket_bytes=80)
    values = {kind: {name: whole(kind, name)[shard.slices] * filled for name, shard in shards.items()} for kind in KINDS}
    optimizer = AdamW(buckets, Config(), values["parameter"], "cpu")
    optimizer.exp_avg, optimizer.exp_avg_sq = (buckets.own(values[kind]) for kind in KINDS[1:])
    return optimizer


def save(output, step, tp=2, dp=2, limit=None, zero_1=False):
    """What the loop does, with a thread a rank and the CPU as every rank's device."""
    config = replace(Config(), output_dir=str(output), save_total_limit=limit)
    tiny = SAMPLE / "tiny"
    job = SimpleNamespace(config=config, model_directory=tiny, tokenizer=load_tokenizer(tiny), identity=IDENTITY,
                          model_reference="tiny")
    meeting = Meeting(tp * dp)

    def rank_saves(rank):
        mesh = Mesh.create(rank, tp * dp, tp)
        runtime = ThreadRuntime(rank, tp * dp, torch.device("cpu"), meeting)
        save_checkpoint(runtime, mesh, job, Position(step, 1, 3), optimizer_of(mesh, True, zero_1))

    with ThreadPoolExecutor(tp * dp) as pool:
        list(pool.map(rank_saves, range(tp * dp)))
    return output / f"checkpoint-{step}"


@pytest.mark.parametrize("zero_1, files", [(False, 2), (True, 6)])
def test_what_some_ranks_wrote_any_topology_reads(tmp_path, zero_1, files):
    """Also where ZeRO-1 divides 6 or 24 elements over 3 or 5 ranks, and buckets cut them."""
    checkpoint = Checkpoint(save(tmp_path, 7, dp=3, zero_1=zero_1))
    assert checkpoint.step == 7 and checkpoint.position == Position(7, 1, 3) and checkpoint.lora is None
    assert sorted(checkpoint.manifest["files"]) == [f"rank-{rank:05d}.safetensors" for rank in range(6) if zero_1 or rank < 2]
    assert len(checkpoint.manifest["files"]) == files
    assert checkpoint.shapes == {name: shape for name, (shape, _) in SHAPES.items()}
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(checkpoint.read(kind, name), whole(kind, name))
    for tp, dp, divided in ((1, 1, False), (2, 1, False), (4, 1, False), (1, 5, True), (2, 5, True), (2, 2, False)):
        for rank in range(tp * dp):
            mesh = Mesh.create(rank, tp * dp, tp)
            optimizer, expected = optimizer_of(mesh, False, divided), optimizer_of(mesh, True, divided)
            checkpoint.restore(optimizer)
            for name, shard in shards_of(mesh).items():
                assert torch.equal(checkpoint.read("parameter", name, shard), whole("parameter", name)[shard.slices])
            for ours, theirs in ((optimizer.exp_avg, expected.exp_avg), (optimizer.exp_avg_sq, expected.exp_avg_sq)):
                assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs) > 2


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "checkpoint-9.incomplete").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (9, 10, 100):
        save(tmp_path, step, tp=1, dp=1, limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-best"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def break_header(path):
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)


def forget_a_rank(path):
    manifest = path.parent / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["files"][path.name]
    manifest.write_text(json.dumps(values))


def misplace(path):
    manifest = path.parent / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"position": {"epoch": 1}}))


@pytest.mark.parametrize("damage, problem", [
    (Path.unlink, "rank-00001.safetensors is missing"), (cut, "rank-00001.safetensors has .* bytes of .* is truncated"),
    (break_header, "rank-00001.safetensors is damaged"),
    (forget_a_rank, r"of the 2 parts of parameter/column.weight, the files hold \[0\]"),
    (lambda path: (path.parent / "manifest.json").unlink(), "is no complete checkpoint"),
    (lambda path: cut(path.parent / "manifest.json"), "manifest.json is damaged"),
    (lambda path: (path.parent / "manifest.json").write_text('{"format": "other"}'), "format 'other'"),
    (misplace, "manifest.json is damaged: its position is"),
    (lambda path: (path.parent / "manifest.json").write_text('{"format": "markstep checkpoint", "version": 2}'), "has no step"),
])
def test_damage_is_named(tmp_path, damage, problem):
    path = save(tmp_path, 7)
    damage(path / "rank-00001.safetensors")
    with pytest.raises(ValueError, match=problem):
        Checkpoint(path)


def test_a_name_that_was_changed_is_found_before_it_is_read(tmp_path):
    path = save(tmp_path, 7, tp=1, dp=1)
    shapes = {name: shape for name, (shape, _) in SHAPES.items()}
    Checkpoint(path).check_tensors(shapes)
    with pytest.raises(ValueError, match=r"exp_avg/other has shape none, and \(3,\) was expected"):
        Checkpoint(path).check_tensors(shapes | {"other": (3,)})
    file = path / "rank-00000.safetensors"
    for old, new in [(b"parameter/row", b"parameter/raw"), (b'"F32"', b'"I32"'), (rb'\"index\"', rb'\"Index\"')]:
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new, 1))
        with pytest.raises(ValueError, match="rank-00000.safetensors is damaged"):
            Checkpoint(path)
        file.write_bytes(content)


def test_another_runs_checkpoint_is_refused(tmp_path):
    checkpoint = Checkpoint(save(tmp_path, 7, tp=1, dp=1))
    checkpoint.check(IDENTITY)
    with pytest.raises(ValueError, match="is of another run: its seed is 1, and that of these flags is 2"):
        checkpoint.check(IDENTITY | {"seed": 2})


def test_what_is_in_the_output_directory_is_not_overwritten(tmp_path):
    used, new = tmp_path / "used", tmp_path / "new"
    for step in (5, 10):
        save(used, step, tp=1, dp=1)
    assert find_checkpoint(str(new), None) is None
    assert find_checkpoint(str(used), "latest").step == 10
    assert find_checkpoint(str(used), str(used / "checkpoint-10")).step == 10
    assert find_checkpoint(str(new), str(used / "checkpoint-5")).step == 5
    (new / "sub").mkdir(parents=True)
    (new / "metrics.jsonl").write_text("{}\n")
    for output, resume, problem in [
        (used, None, "holds checkpoint-10 of another run: pass --resume latest"),
        (used, str(used / "checkpoint-5"), "holds the later checkpoint-10"),
        (new, None, "holds metrics.jsonl of another run: move it away"),
        (new, str(used / "checkpoint-5"), "holds metrics.jsonl of another run: move it away"),
        (new, "latest", "holds no checkpoint"), (new, str(tmp_path / "none"), "is no complete checkpoint"),
        (new / "metrics.jsonl", None, "is a file"), (new, "", "is no complete checkpoint"),
    ]:
        with pytest.raises(ValueError, match=problem):
            find_checkpoint(str(output), resume)
