"""Checkpoints are read on any topology, and incomplete or damaged ones are rejected."""

import json
from pathlib import Path
from threading import BrokenBarrierError

import pytest
import torch

from data.loader import Position
from model.weights.safetensors_file import TensorFile
from parallel.mesh import Mesh
from tests.support import saved
from tests.support.saved import IDENTITY, SHAPES, optimizer_of, resume_all, save, shards_of, whole
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.names import KINDS, list_checkpoints, manifest_checksum
from trainer.checkpoint.reader import Checkpoint


@pytest.mark.parametrize("zero_1, files", [(False, 2), (True, 6)])
def test_what_some_ranks_wrote_any_topology_reads(tmp_path, zero_1, files):
    """Also where ZeRO-1 divides 6 or 24 elements over 3 or 5 ranks, and buckets cut them."""
    checkpoint = Checkpoint(save(tmp_path, 7, dp=3, zero_1=zero_1))
    assert checkpoint.step == 7 and checkpoint.position == Position(7, 1, 3) and checkpoint.lora is None
    written = [name for name in checkpoint.manifest["files"] if name.startswith("rank-")]
    assert written == [f"rank-{rank:05d}.safetensors" for rank in range(files)]
    checkpoint.verify()
    assert checkpoint.shapes == {name: shape for name, (shape, _) in SHAPES.items()}
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(checkpoint.read(kind, name), whole(kind, name, 7))
    for tp, dp, divided in (
        (1, 1, False),
        (2, 1, False),
        (4, 1, False),
        (1, 5, True),
        (2, 5, True),
        (2, 2, False),
    ):
        meshes = [Mesh.create(rank, tp * dp, tp) for rank in range(tp * dp)]
        for mesh, optimizer in zip(meshes, resume_all(checkpoint, meshes, divided), strict=True):
            expected = optimizer_of(mesh, 7, divided)
            for name, shard in shards_of(mesh).items():
                assert torch.equal(
                    checkpoint.read("parameter", name, shard), whole("parameter", name, 7)[shard.slices]
                )
            for ours, theirs in (
                (optimizer.weights, expected.weights),
                (optimizer.exp_avg, expected.exp_avg),
                (optimizer.exp_avg_sq, expected.exp_avg_sq),
            ):
                assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs) > 2


@pytest.mark.parametrize("zero_1, writers", [(False, [0, 1, 4, 5]), (True, range(8))])
def test_stages_save_and_read_what_is_theirs(tmp_path, zero_1, writers):
    checkpoint = Checkpoint(save(tmp_path, 7, pp=2, zero_1=zero_1))
    written = [name for name in checkpoint.manifest["files"] if name.startswith("rank-")]
    assert written == [f"rank-{rank:05d}.safetensors" for rank in writers]
    assert checkpoint.manifest["pipeline_parallel_size"] == 2
    checkpoint.verify()
    checkpoint.check_tensors({name: shape for name, (shape, _) in SHAPES.items()})
    assert all(
        torch.equal(checkpoint.read(kind, name), whole(kind, name, 7)) for kind in KINDS for name in SHAPES
    )
    for pp in (1, 2):
        meshes = [Mesh.create(rank, 8, 2, pp) for rank in range(8)]
        for mesh, optimizer in zip(meshes, resume_all(checkpoint, meshes, zero_1), strict=True):
            expected = optimizer_of(mesh, 7, zero_1)
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                for name, shard in shards_of(mesh).items():
                    ours, theirs = (
                        each.buckets.own_piece(name, getattr(each, kind))[0] for each in (optimizer, expected)
                    )
                    assert not ours.any() if shard.padding else torch.equal(ours, theirs), name


def test_a_rank_reads_what_it_needs(tmp_path, monkeypatch):
    checkpoint, read = Checkpoint(save(tmp_path, 7, zero_1=True)), []
    elements = TensorFile.elements
    monkeypatch.setattr(
        TensorFile, "elements", lambda *arguments: read.append(arguments[3]) or elements(*arguments)
    )
    for tp in (1, 2, 4):
        for rank in range(tp):
            for name, shard in shards_of(Mesh.create(rank, tp, tp)).items():
                read.clear()
                checkpoint.read("exp_avg", name, shard)
                assert sum(read) == shard.numel


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "checkpoint-9.incomplete").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (9, 10, 100):
        save(tmp_path, step, tp=1, dp=1, limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-best",
    ]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def break_header(path):
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)


def rewrite(**changes):
    """Change values of the manifest, and its checksum accordingly."""

    def change(path):
        manifest = path.parent / "manifest.json"
        values = json.loads(manifest.read_text()) | changes
        manifest.write_text(json.dumps(values | {"checksum": manifest_checksum(values)}))

    return change


def forget_a_slice(path):
    tensors = json.loads((path.parent / "manifest.json").read_text())["tensors"]
    tensors["parameter/column.weight"]["ranks"][1] = []
    rewrite(tensors=tensors)(path)


def replace_text(name, old, new):
    def change(path):
        content = (path.parent / name).read_bytes()
        assert old in content
        (path.parent / name).write_bytes(content.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    "damage, problem",
    [
        (Path.unlink, "rank-00001.safetensors is missing"),
        (cut, "rank-00001.safetensors has .* bytes of .* is damaged"),
        (break_header, "rank-00001.safetensors is damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:8] + bytes(path.stat().st_size - 8)),
            "00001.safetensors is damaged: its",
        ),
        (forget_a_slice, "of part 1 of parameter/column.weight, the files hold 0 of 24 elements"),
        (lambda path: (path.parent / "manifest.json").unlink(), "is no complete checkpoint"),
        (lambda path: cut(path.parent / "manifest.json"), "manifest.json is damaged"),
        (rewrite(format="other"), "format 'other'"),
        (rewrite(version=2), "format 'markstep checkpoint' version 2"),
        (replace_text("manifest.json", b'"row":3', b'"row":4'), "manifest.json is damaged: its checksum"),
        (replace_text("config.json", b"llama", b"lama2"), "config.json is damaged: its checksum"),
        (
            replace_text("rank-00001.safetensors", b"exp_avg/row", b"exp_avg/raw"),
            "rank-00001.safetensors is damaged: its checksum",
        ),
        (
            replace_text("rank-00001.safetensors", b'"F32"', b'"I32"'),
            "rank-00001.safetensors is damaged: its checksum",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, problem):
    path = save(tmp_path, 7)
    damage(path / "rank-00001.safetensors")
    with pytest.raises(ValueError, match=problem):
        Checkpoint(path)


def test_every_byte_of_the_tensors_counts(tmp_path):
    path = save(tmp_path, 7, tp=1, dp=2, zero_1=True)
    file = path / "rank-00001.safetensors"
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    noticed = []
    for place in range(begin, len(content), 29):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(
            ValueError,
            match="rank-00001.safetensors is damaged: the bytes of .* are not those that were saved",
        ):
            Checkpoint(path).verify()
        for name in SHAPES:  # streaming verifies only the tensor that it reads
            try:
                list(Checkpoint(path).stream(name))
            except ValueError as error:
                noticed.append(f"the bytes of parameter/{name} are" in str(error))
    assert noticed and all(noticed)


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, 7, tp=1, dp=1)
    shapes = {name: shape for name, (shape, _) in SHAPES.items()}
    Checkpoint(path).check_tensors(shapes)
    with pytest.raises(ValueError, match=r"exp_avg/other has shape none, and \(3,\) was expected"):
        Checkpoint(path).check_tensors(shapes | {"other": (3,)})


def test_replicas_that_differ_end_the_run(tmp_path):
    def spoil(rank, optimizer):
        if rank == 1:
            name = "norm.weight"
            for bucket, state in zip(optimizer.buckets.buckets, optimizer.weights, strict=True):
                if bucket.pieces[0][0] == name:
                    state += 1e-6

    save(tmp_path, 6)
    with pytest.raises(
        (RuntimeError, BrokenBarrierError), match="parameter/norm.weight of rank 1 is not that of rank 0|^$"
    ):
        save(tmp_path, 7, change=spoil)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6]


def test_a_tokenizer_that_saves_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(
        saved.TOKENIZER, "chat_template", {"default": "{{ messages }}", "tools": "{{ tools }}"}
    )
    path = save(tmp_path, 7)
    assert "additional_chat_templates/tools.jinja" in Checkpoint(path).manifest["files"]


def test_a_later_damaged_checkpoint_does_not_push_the_new_one_out(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoint-20" / "manifest.json").unlink()
    save(tmp_path, 15, limit=1, losses=[float("nan")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-20.damaged-1"]


def test_the_best_and_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, tp=1, dp=1, limit=1, losses=(3.0, 1.0, 2.0, 2.0))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]


def test_latest_is_the_newest_that_is_whole(tmp_path, capsys):
    assert find_checkpoint(str(tmp_path), "latest") is None
    assert "holds no checkpoint yet" in capsys.readouterr().out
    paths = [save(tmp_path, step) for step in (5, 10, 15)]
    (tmp_path / "checkpoint-20.incomplete").mkdir()
    (tmp_path / "checkpoint-30").mkdir()
    content = bytearray((paths[2] / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (paths[2] / "rank-00000.safetensors").write_bytes(content)
    assert find_checkpoint(str(tmp_path), "latest").step == 10
    said = capsys.readouterr().out
    assert all(
        part in said
        for part in (
            "checkpoint-20.incomplete is incomplete",
            "checkpoint-30 is no complete",
            "checkpoint-15/rank-00000.safetensors is damaged",
        )
    )
    save(tmp_path, 15)  # what is in the way is moved, not lost
    assert (
        find_checkpoint(str(tmp_path), "latest").step == 15
        and (tmp_path / "checkpoint-15.damaged-1").is_dir()
    )
    for path in (*paths, tmp_path / "checkpoint-30"):
        (path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(
        ValueError,
        match="no checkpoint in .* is whole; of the oldest, .*checkpoint-5 is no complete checkpoint",
    ):
        find_checkpoint(str(tmp_path), "latest")


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
        (new, str(tmp_path / "none"), "is no complete checkpoint"),
        (new / "metrics.jsonl", None, "is a file"),
        (new, "", "is no complete checkpoint"),
    ]:
        with pytest.raises(ValueError, match=problem):
            find_checkpoint(str(output), resume)
