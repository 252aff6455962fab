"""--overwrite_output_dir: the run that was there makes way, and nothing else does."""

from types import SimpleNamespace

import pytest

from trainer.checkpoint.find import find_checkpoint
from trainer.config import Config
from trainer.job import make_way


def write(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


OF_A_RUN = [
    "checkpoint-10.damaged-1/manifest.json",
    "checkpoint-20/config.json",
    "checkpoint-20/rank-00000.safetensors",
    "checkpoint-30.incomplete/rank-00000.safetensors.partial",
    "eval.jsonl",
    "metrics.jsonl",
    "runs/events.out.tfevents.1.host.2.0.markstep",
    "samples.jsonl",
    "starts.jsonl",
    "wandb_run_id",
]
OF_OTHERS = [
    "checkpoints.txt",
    "merged/config.json",
    "notes/metrics.jsonl",
    "runs/events.out.tfevents.1.host.2.0",
]


def test_a_run_makes_way(tmp_path, capsys):
    write(tmp_path, *OF_A_RUN, *OF_OTHERS)
    config = Config(output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(
        ValueError, match="--resume latest to go on with it, or choose .* --overwrite_output_dir"
    ):
        find_checkpoint(str(tmp_path), None)
    assert find_checkpoint(str(tmp_path), None, overwrites=True) is None
    assert names(tmp_path) == sorted(OF_A_RUN + OF_OTHERS)  # looking changes nothing
    make_way(config)
    moved = [f"overwritten-1/{name}" for name in OF_A_RUN]
    assert names(tmp_path) == sorted(moved + OF_OTHERS)
    assert all((tmp_path / name).read_text() == name.removeprefix("overwritten-1/") for name in moved)
    assert f"is now in {tmp_path}/overwritten-1" in capsys.readouterr().out
    make_way(config)  # nothing is left to move
    assert names(tmp_path) == sorted(moved + OF_OTHERS) and not capsys.readouterr().out
    write(tmp_path, "metrics.jsonl")
    make_way(config)
    assert names(tmp_path) == sorted(["overwritten-2/metrics.jsonl", *moved, *OF_OTHERS])


def test_curves_that_are_elsewhere(tmp_path):
    event = "events.out.tfevents.1.host.2.0.markstep"
    write(tmp_path, f"logs/{event}", "logs/events.out.tfevents.1.other", "out/metrics.jsonl")
    logs, out = str(tmp_path / "logs"), str(tmp_path / "out")
    make_way(Config(output_dir=out, logging_dir=logs, overwrite_output_dir=True))
    assert names(tmp_path) == [
        "logs/events.out.tfevents.1.other",
        "out/overwritten-1/metrics.jsonl",
        f"out/overwritten-1/runs/{event}",
    ]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("checkpoint-500/trainer_state.json", "is a directory with trainer_state.json"),
        ("checkpoint-7", "is a file"),
    ],
)
def test_what_no_run_has_made_is_not_moved(tmp_path, name, problem):
    write(tmp_path, "metrics.jsonl", name)
    with pytest.raises(ValueError, match=f"{problem}, which no run has made: move it away"):
        find_checkpoint(str(tmp_path), None, overwrites=True)
    assert names(tmp_path) == sorted(["metrics.jsonl", name])
    with pytest.raises(ValueError, match="is a file: a directory was expected"):
        find_checkpoint(str(tmp_path / "metrics.jsonl"), None, overwrites=True)


def test_a_job_of_torchrun_moves_once(tmp_path, monkeypatch):
    """Only the first process moves: another one would take the new run's files."""
    write(tmp_path, "metrics.jsonl")
    monkeypatch.setattr("trainer.job.meet", lambda: SimpleNamespace(is_first=False))
    make_way(Config(output_dir=str(tmp_path), overwrite_output_dir=True))
    assert names(tmp_path) == ["metrics.jsonl"]
