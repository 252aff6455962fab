"""What a save leaves alone: good checkpoints, where it fails or the state is bad, and what is the user's."""

import math
import os
from pathlib import Path
from threading import BrokenBarrierError

import pytest

from tests.support.saved import SHAPES, save
from tools.inspect_checkpoint.__main__ import main as inspect
from tools.merge_checkpoint.merging import merge, new_directory
from trainer.checkpoint import writer
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.names import NonFinite, list_checkpoints
from trainer.checkpoint.reader import Checkpoint
from trainer.checkpoint.writer import Saver


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def spoil(value, kind="weights", of_rank=3):
    """A change of one element of one rank's state."""

    def change(rank, optimizer):
        if rank == of_rank:
            getattr(optimizer, kind)[0][0, 0] = value

    return change


@pytest.mark.parametrize("kind, value", [("weights", math.nan), ("exp_avg_sq", math.inf)])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, capsys, kind, value):
    """Nor does it count as one of the newest, where the run goes on."""
    save(tmp_path, 1, limit=1, zero_1=True)
    key = {"weights": "parameter", "exp_avg_sq": "exp_avg_sq"}[kind] + "/column.weight"
    with pytest.raises(NonFinite, match=f"checkpoint-2 is not saved: {key} has values that are not finite"):
        save(tmp_path, 2, limit=1, zero_1=True, change=spoil(value, kind))
    assert names(tmp_path) == ["checkpoint-1"]
    save(tmp_path, 2, limit=1, zero_1=True, change=spoil(value, kind), on_nonfinite="ignore")
    assert (
        names(tmp_path) == ["checkpoint-1"]
        and "warning: checkpoint-2 is not saved" in capsys.readouterr().err
    )
    Checkpoint(tmp_path / "checkpoint-1").verify()


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, monkeypatch, capsys):
    """As an earlier version wrote it: its checksums hold."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "is_finite", lambda values: True)
        path = save(tmp_path, 2, zero_1=True, change=spoil(math.nan))
    problem = "checkpoint-2: parameter/column.weight has values that are not finite"
    with pytest.raises(ValueError, match=problem):
        Checkpoint(path).verify()
    with pytest.raises(ValueError, match=problem):
        list(Checkpoint(path).stream("column.weight"))
    assert find_checkpoint(str(tmp_path), "latest").step == 1
    assert f"--resume latest: skipped: {tmp_path}/{problem}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=problem):
        find_checkpoint(str(tmp_path / "new"), str(path))
    assert inspect([str(path)]) == 1 and problem in capsys.readouterr().out
    assert inspect([str(tmp_path)]) == 1 and problem in capsys.readouterr().out


@pytest.mark.parametrize("verify", [False, True])
def test_a_model_that_is_not_finite_is_not_merged(tmp_path, monkeypatch, verify):
    from model.config import ModelConfig
    from model.weights.shapes import base_shapes
    from trainer.config_derived import SAMPLE

    shapes = {
        name: (shape, 0 if len(shape) > 1 else None)
        for name, shape in base_shapes(ModelConfig.from_pretrained(SAMPLE / "tiny")).items()
    }
    monkeypatch.setattr(writer, "is_finite", lambda values: True)
    path = save(tmp_path, 1, shapes=shapes, bucket_bytes=10**6, change=spoil(math.nan, of_rank=1))
    with pytest.raises(ValueError, match="checkpoint-1: parameter/.* has values that are not finite"):
        merge(path, tmp_path / "merged", verify=verify)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_merge_touches_only_what_a_merge_has_left(tmp_path):
    partial = tmp_path / "merged.incomplete"
    for make, what in ((Path.touch, "a file"), (Path.mkdir, "a directory with config.yaml")):
        make(partial)
        if partial.is_dir():
            (partial / "config.yaml").touch()
        with (
            pytest.raises(ValueError, match=f"merged.incomplete is {what}, which no merge has made: move it"),
            new_directory(tmp_path / "merged"),
        ):
            pass
        (partial / "config.yaml" if partial.is_dir() else partial).unlink()
    for name in ("model-00001-of-00002.safetensors", "config.json", "tokenizer.json"):
        (partial / name).touch()
    with new_directory(tmp_path / "merged"):
        (partial / "config.json").touch()
    assert names(tmp_path / "merged") == ["config.json"]


@pytest.mark.parametrize("failing", [0, 3])
def test_a_save_that_fails_is_noticed_at_once(tmp_path, monkeypatch, failing):
    """`check`, which the loop calls after each step, raises on the rank, and nothing is left."""
    save(tmp_path, 1)
    write, waited = Saver._write, Saver.wait

    def fail(saver, partial, state):
        if saver.runtime.rank == failing:
            raise OSError(28, "No space left on device", str(partial / "rank"))
        write(saver, partial, state)

    def steps(saver):
        """In place of the next save's wait: steps without a barrier, until one of them ends the run."""
        while saver._written:
            saver.check()
            saver.runtime.barrier()

    monkeypatch.setattr(Saver, "_write", fail)
    monkeypatch.setattr(Saver, "wait", lambda saver: steps(saver) if saver._written else waited(saver))
    with pytest.raises((OSError, BrokenBarrierError)) as caught:
        save(tmp_path, 2, zero_1=True)
    assert names(tmp_path) == ["checkpoint-1"]
    if isinstance(caught.value, OSError):
        assert "checkpoint-2.incomplete could not be written: [Errno 28] No space left" in str(caught.value)


def test_what_is_the_users_is_left_alone(tmp_path):
    """A linked checkpoint, and files and folders with suffixes of ours."""
    elsewhere = tmp_path / "elsewhere"
    output = tmp_path / "output"
    save(elsewhere, 1)
    output.mkdir()
    (output / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
    (output / "checkpoint-1.incomplete").symlink_to(elsewhere)
    (output / "checkpoint-notes.incomplete").write_text("mine")
    (output / "checkpoint-mine.incomplete").mkdir()
    (output / "checkpoint-0.incomplete").mkdir()
    (output / "checkpoint-0.incomplete" / "notes").write_text("mine")
    mine = names(output)
    save(output, 2, 3, 4, limit=1)
    assert names(output) == sorted([*mine, "checkpoint-4"])
    assert find_checkpoint(str(output), "latest").step == 4
    save(output, 5, limit=1)
    assert names(output) == sorted([*mine, "checkpoint-5"])
    Checkpoint(elsewhere / "checkpoint-1").verify()


@pytest.mark.parametrize(
    "name, make, problem",
    [
        ("checkpoint-7.incomplete", Path.touch, "is a file"),
        ("checkpoint-7", Path.touch, "is a file"),
        ("checkpoint-7", lambda path: path.symlink_to("nowhere"), "is a link"),
        ("checkpoint-7.incomplete", lambda path: path.symlink_to("."), "is a link"),
        (
            "checkpoint-7.incomplete",
            lambda path: (path.mkdir(), (path / "notes.txt").touch()),
            "is a directory with notes.txt",
        ),
    ],
)
def test_a_name_that_a_save_needs(tmp_path, name, make, problem):
    save(tmp_path, 5)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {problem}, which no run has made: move it away, .* step 7"):
        find_checkpoint(str(tmp_path), "latest")
    os.rename(tmp_path / name, tmp_path / name.replace("7", "3"))  # a step that is done
    assert find_checkpoint(str(tmp_path), "latest").step == 5


def test_a_renamed_checkpoint(tmp_path, capsys):
    for step in (5, 10):
        save(tmp_path, step)
    os.rename(tmp_path / "checkpoint-10", tmp_path / "checkpoint-20")
    problem = "checkpoint-20 is whole, but was renamed: it holds step 10, so it was checkpoint-10"
    with pytest.raises(ValueError, match=problem):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-20"))
    assert find_checkpoint(str(tmp_path), "latest").step == 5
    assert problem in capsys.readouterr().out
    save(tmp_path, 6)
    assert "checkpoint-20 is renamed to checkpoint-20.damaged-1" in capsys.readouterr().out
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 6]
    assert find_checkpoint(str(tmp_path / "new"), str(tmp_path / "checkpoint-20.damaged-1")).step == 10
    assert set(SHAPES) == set(Checkpoint(tmp_path / "checkpoint-20.damaged-1").shapes)
