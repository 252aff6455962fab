"""Processes that resume together read a checkpoint once, verify all of it, and agree on which one it is.

Each process is a thread with a store in memory, and its rank has no device.
"""

import os
import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from parallel.buckets import Buckets
from parallel.mesh import Mesh
from parallel.shard import Shard
from tests.support.processes import in_processes
from tests.support.saved import SHAPES, as_version_3, give_shares, optimizer_of, save, whole
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.names import MANIFEST
from trainer.checkpoint.reader import Checkpoint

# Matrices of several chunks a piece, and of rows that are no part of a chunk.
LARGE = {"column.weight": ((720, 500), 0), "row.weight": ((500, 720), 1), "norm.weight": ((500,), None)}
STATE = {"shapes": LARGE, "bucket_bytes": 600_000}


def resume_together(output, world, tp=2, zero_1=True, resume="latest", state=None, of_rank=None):
    """[(the checkpoint, or the text of the error; the optimizer)] of all ranks.

    of_rank(rank): the output directory as its node has it.
    """

    def process(peers):
        optimizer = optimizer_of(Mesh.create(peers.rank, world, tp), 0, zero_1, **(state or {}))
        directory = of_rank(peers.rank) if of_rank else output
        try:
            return find_checkpoint(str(directory), resume, False, optimizer.buckets, peers), optimizer
        except ValueError as error:
            return str(error), optimizer

    return in_processes(process, world)


def bytes_read():
    """By all threads of this process, by any call."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Saved by 8 ranks, TP2 x DP4, with ZeRO-1 and without; of chunks that are as small beside the shares of
    these matrices as those of format 4 are beside a model's."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("writer", "pieces"):
            patch.setattr(f"trainer.checkpoint.{module}.CHUNK", 2048)
        outputs = {zero_1: tmp_path_factory.mktemp("large") for zero_1 in (True, False)}
        for zero_1, output in outputs.items():
            save(output, 7, dp=4, zero_1=zero_1, **STATE)
        yield outputs


@pytest.mark.parametrize("saved_with", [True, False])
@pytest.mark.parametrize("zero_1", [True, False])
@pytest.mark.parametrize(
    "world, tp, most", [(8, 2, 1.2), (4, 2, 1.2), (2, 2, 1.2), (12, 2, 1.2), (4, 4, 1.6), (3, 1, 1.2)]
)
def test_every_byte_is_read_once(large, saved_with, zero_1, world, tp, most):
    """Also with other data parallel ranks than the saver's. With twice as many tensor parallel ones, half of
    the parameters (row.weight) are read twice."""
    output = large[saved_with]
    resume_together(output, 1, 1, state=STATE)  # what is imported late is no byte of a checkpoint
    size = sum(file.stat().st_size for file in (output / "checkpoint-7").iterdir())
    before = bytes_read()
    found = resume_together(output, world, tp, zero_1, state=STATE)
    read = bytes_read() - before
    assert size < read < most * size
    before = bytes_read()
    parts = [checkpoint.part(optimizer.buckets) for checkpoint, optimizer in found]
    assert bytes_read() - before < 1000 and {checkpoint.step for checkpoint, _ in found} == {7}
    for optimizer in give_shares([optimizer for _, optimizer in found], parts):
        expected = optimizer_of(optimizer.buckets.mesh, 7, zero_1, **STATE)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            assert all(map(torch.equal, getattr(optimizer, kind), getattr(expected, kind)))


def test_replicas_are_read_once():
    """A bucket that all tensor parallel ranks hold is divided among them, too."""
    for zero_1 in (True, False):
        found = []
        for rank in range(6):
            shard = Shard((50,), replicas=2)
            mesh = Mesh.create(rank, 6, 2)
            [share] = Buckets([("norm", torch.nn.Parameter(torch.zeros(50)), shard)], mesh, zero_1).shares()
            found += [(each.first, each.first + min(each.count, 50 - each.first)) for each in share]
        assert sorted(found)[0][0] == 0 and max(found)[1] == 50 and len(set(found)) == 6
        assert all(first == end for (_, end), (first, _) in pairwise(sorted(found)))


def flip(path, place):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_together(tmp_path, capsys):
    """In each file, every so many bytes: all ranks take the checkpoint before it, and one says why."""
    save(tmp_path, 6)
    path, flipped = save(tmp_path, 7, zero_1=True), 0
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        step = max(1, size // 6)
        for place in {0, 4, 9, size - 1, *range(0, size, step)}:
            flip(file, place)
            for world, zero_1 in ((4, False), (2, True)):
                found = resume_together(tmp_path, world, zero_1=zero_1)
                assert [checkpoint.step for checkpoint, _ in found] == [6] * world, (file, place)
                said = capsys.readouterr().out.splitlines()
                assert len(said) == 1 and said[0].startswith("--resume latest: skipped: "), said
                assert file.name in said[0] and " on host-" in said[0], said
            flip(file, place)
            flipped += 1
    assert flipped > 80
    found = resume_together(tmp_path, 4)
    assert [checkpoint.step for checkpoint, _ in found] == [7] * 4


def test_what_one_process_sees_decides_for_all(tmp_path, capsys, monkeypatch):
    output, other = tmp_path / "out", tmp_path / "other"
    for step in (6, 7):
        save(output, step, zero_1=True)
    shutil.copytree(output, other)  # as the second node sees it
    broken = other / "checkpoint-7" / "rank-00003.safetensors"
    aside = broken.rename(tmp_path / "aside")

    def steps():
        found = resume_together(output, 4, of_rank=lambda rank: other if rank == 3 else output)
        return [checkpoint.step for checkpoint, _ in found], capsys.readouterr().out

    taken, said = steps()
    problem = f"{broken} is missing: the checkpoint is damaged (says rank 3 on host-1)"
    assert taken == [6] * 4 and said == f"--resume latest: skipped: {problem}\n"

    aside.rename(broken)
    opens = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, *flags: denied() if path == broken else opens(path, *flags))
        taken, said = steps()
    assert taken == [6] * 4 and said.count("skipped") == 1
    assert "checkpoint-7 cannot be read: [Errno 13] Permission denied (says rank 3 on host-1)" in said
    assert steps() == ([7] * 4, "")

    shutil.rmtree(other / "checkpoint-7")
    shutil.copytree(save(tmp_path / "newer", 7, zero_1=True, losses=[1.0]), other / "checkpoint-7")
    taken, said = steps()
    assert taken == [6] * 4
    assert "its manifest.json is not the one that rank 0 on host-0 has read (says rank 3 on host-1)" in said


def denied():
    raise PermissionError(13, "Permission denied")


def test_a_checkpoint_that_was_named_is_an_error_of_all(tmp_path):
    path = save(tmp_path, 7, zero_1=True)
    flip(path / "rank-00003.safetensors", -1)
    for resume, problem in (
        (path, "rank-00003.safetensors is damaged: the bytes of exp_avg_sq/row.weight are not those"),
        ("latest", f"--resume latest: no checkpoint in {tmp_path} is whole; of the oldest, "),
        (None, f"--output_dir {tmp_path} holds checkpoint-7 of another run: pass --resume latest"),
        (tmp_path / "none", "none is no complete checkpoint"),
    ):
        errors = {error for error, _ in resume_together(tmp_path, 4, resume=resume and str(resume))}
        assert len(errors) == 1 and problem in errors.pop(), resume


def test_another_model_is_not_read(tmp_path):
    """That it is another one is said later, by check_tensors."""
    save(tmp_path, 7)
    others = {"shapes": SHAPES | {"more.weight": ((4, 4), 0)}}
    for checkpoint, optimizer in resume_together(tmp_path, 2, state=others):
        shapes = {name: shard.global_shape for name, shard in optimizer.buckets.shards.items()}
        with pytest.raises(ValueError, match="is of another model: exp_avg/more.weight has shape none"):
            checkpoint.check_tensors(shapes)


@pytest.mark.parametrize("saved_with", [True, False])
def test_version_3_is_read(tmp_path, saved_with):
    path = as_version_3(save(tmp_path, 7, dp=3, zero_1=saved_with))
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    assert checkpoint.manifest["version"] == 3 and "checksums" not in (path / MANIFEST).read_text()
    for name in SHAPES:
        assert torch.equal(torch.cat(list(checkpoint.stream(name))), whole("parameter", name, 7))
    for world, zero_1 in ((4, True), (6, False)):
        found = resume_together(tmp_path, world, zero_1=zero_1)
        parts = [checkpoint.part(optimizer.buckets) for checkpoint, optimizer in found]
        for optimizer in give_shares([optimizer for _, optimizer in found], parts):
            expected = optimizer_of(optimizer.buckets.mesh, 7, zero_1)
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                assert all(map(torch.equal, getattr(optimizer, kind), getattr(expected, kind)))
    flip(path / "rank-00001.safetensors", -1)
    with pytest.raises(ValueError, match="rank-00001.safetensors is damaged: the bytes of .*/row.weight"):
        Checkpoint(path).verify()
    [error] = {error for error, _ in resume_together(tmp_path, 4)}
    assert "rank-00001.safetensors is damaged: the bytes of " in error


def open_files():
    """The paths of the files that this process has open."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed by another thread meanwhile
            yield os.readlink(f"/proc/self/fd/{number}")


def test_few_files_are_open(tmp_path, monkeypatch):
    """Of 200 files, whoever reads them; `most` is what the process had open at once."""
    path, most, preadv = save(tmp_path, 7, dp=100, zero_1=True), [0], os.preadv

    def counted(*arguments):
        most[0] = max(most[0], sum(str(tmp_path) in name for name in open_files()))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", counted)
    assert len(list(path.glob("rank-*"))) == 200
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("parameter", "row.weight"), whole("parameter", "row.weight", 7))
    assert [found.step for found, _ in resume_together(tmp_path, 2, zero_1=False)] == [7, 7]
    assert 2 < most[0] <= 40  # 32, and those whose header the library is checking
    checkpoint.close()
