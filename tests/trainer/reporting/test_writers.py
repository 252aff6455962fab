"""--report_to: the curves of TensorBoard and W&B, what they need, and writers that fail."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import Config, parse
from trainer.job import StopRequest
from trainer.reporting import writers
from trainer.reporting.files import RunFiles
from trainer.reporting.writers import Curves, check_writers

ANSWERS = [{"prompt": "# a\n\nb", "answer": "c", "expected": "d"}]


def train(output, steps, evaluates_at=(), **flags):
    """The curves of a run whose train/loss at each step is 10 x step, after the files of it."""
    output.mkdir(exist_ok=True)
    config = Config(output_dir=str(output), **flags)
    files = RunFiles(output, StopRequest().make)
    logged, evaluated = files.continue_from(steps.start - 1, bool(evaluates_at))
    curves = Curves(SimpleNamespace(config=config), steps.start - 1, logged)
    for step in range(steps.start - 1, steps.stop):
        if step in steps:
            record = {"step": step, "loss": 10.0 * step, "mfu": None}
            files.append("metrics.jsonl", record)
            curves.step(record)
        if step in evaluates_at:
            record = {"step": step, "eval_loss": 5.0 * step, "perplexity": 2.0}
            files.append("eval.jsonl", record)
            if not (evaluated and step == steps.start - 1):
                curves.evaluation(record, ANSWERS)
    curves.close()


def points(directory, tag):
    found = EventAccumulator(str(directory))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)], found.Tags()


def test_tensorboard_has_each_step_once(tmp_path):
    """A run that was cut off after step 6, and goes on from its checkpoint after step 4."""
    train(tmp_path, range(1, 7), evaluates_at=(0, 4), report_to=["tensorboard"])
    train(tmp_path, range(5, 9), evaluates_at=(4, 8), report_to=["tensorboard"], resume="latest")
    losses, tags = points(tmp_path / "runs", "train/loss")
    assert losses == [(step, 10.0 * step) for step in range(1, 9)]
    assert points(tmp_path / "runs", "eval/loss")[0] == [(0, 0.0), (4, 20.0), (8, 40.0)]
    assert sorted(tags["scalars"]) == ["eval/loss", "eval/perplexity", "train/loss"]
    assert {"configuration/text_summary", "samples/1/text_summary"} <= set(tags["tensors"])


def test_another_directory_and_none(tmp_path):
    train(tmp_path / "out", range(1, 3), report_to=["tensorboard"], logging_dir=str(tmp_path / "logs"))
    assert len(points(tmp_path / "logs", "train/loss")[0]) == 2 and not (tmp_path / "out" / "runs").exists()
    train(tmp_path / "quiet", range(1, 3), report_to=["none"])
    assert [path.name for path in (tmp_path / "quiet").iterdir()] == ["metrics.jsonl"]


class Service:
    """W&B as far as it is used: a run for each id, online or offline."""

    def __init__(self, monkeypatch, offline, key=True):
        self.offline, self.runs, self.given, self.fails = offline, {}, [], False
        module = ModuleType("wandb")
        module.__spec__ = SimpleNamespace(origin="wandb/__init__.py")
        module.init, module.login = self.init, lambda prompt, verify: key
        module.Table = lambda columns, data: (columns, data)
        monkeypatch.setitem(sys.modules, "wandb", module)

    def init(self, id, **given):
        self.given.append(given)
        log = self.runs.setdefault(id, [])
        step = 0 if self.offline else max((step for step, _ in log), default=-1) + 1

        def add(values, step):
            if self.fails:
                raise ConnectionError("no route\nto host")
            log.append((step, values))

        return SimpleNamespace(
            offline=self.offline,
            resumed=bool(step),
            step=step,
            log=add,
            finish=lambda: log.append((-1, "end")),
        )


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch, offline):
    service = Service(monkeypatch, offline)
    train(tmp_path, range(1, 7), evaluates_at=(0, 4), report_to=["wandb"], run_name="mine")
    train(tmp_path, range(5, 9), evaluates_at=(4, 8), report_to=["wandb"], resume="latest")
    [log] = service.runs.values()
    assert [(step, values["train/loss"]) for step, values in log if "train/loss" in values] == [
        (step, 10.0 * step) for step in range(1, 9)
    ]
    assert [step for step, values in log if "eval/loss" in values] == [0, 4, 8]
    assert log[1] == (0, {"samples": (["prompt", "answer", "expected"], [["# a\n\nb", "c", "d"]])})
    first = service.given[0]
    assert (first["name"], first["dir"], first["resume"]) == ("mine", str(tmp_path), "allow")
    assert first["config"]["run_name"] == "mine" and log[-1] == (-1, "end")
    # A new run in another directory is another one of W&B's.
    train(tmp_path / "other", range(1, 3), report_to=["wandb"])
    assert len(service.runs) == 2


def test_a_writer_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    service = Service(monkeypatch, offline=True)
    service.fails = True
    train(tmp_path, range(1, 4), report_to=["wandb", "tensorboard"])
    said = capsys.readouterr().err
    assert said == "warning: --report_to wandb failed, and gets nothing more of this run: no route\n"
    assert len(points(tmp_path / "runs", "train/loss")[0]) == 3
    (tmp_path / "file").write_text("")
    train(tmp_path, range(1, 4), report_to=["tensorboard"], logging_dir=str(tmp_path / "file" / "x"))
    assert capsys.readouterr().err.count("warning: --report_to tensorboard failed") == 1


def refused(**flags):
    with pytest.raises(ValueError) as caught:
        check_writers(Config(**flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_said_before_the_run(tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    train(tmp_path / "old", range(1, 3), report_to=["tensorboard"])
    old = str(tmp_path / "old" / "runs")
    assert "holds TensorBoard's files of another run" in refused(
        report_to=["tensorboard"], logging_dir=old, output_dir=output
    )
    for more in ({"resume": "latest"}, {"overwrite_output_dir": True}):
        check_writers(Config(report_to=["tensorboard"], logging_dir=old, output_dir=output, **more))
    (tmp_path / "file").touch()
    assert "cannot be made or written to" in refused(
        report_to=["tensorboard"], logging_dir=str(tmp_path / "file"), output_dir=output
    )
    Service(monkeypatch, offline=False, key=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "no API key is known: run `wandb login`" in refused(report_to=["wandb"], output_dir=output)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_writers(Config(report_to=["wandb"], output_dir=output))
    # W&B's own folder is no package.
    for spec in (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr(writers, "find_spec", lambda name, spec=spec: spec)
        for name in ("wandb", "tensorboard"):
            assert f'{name} is not installed: `pip install -e ".[{name}]"`' in refused(report_to=[name])
        check_writers(Config(report_to=["none"]))
    assert not (tmp_path / "out").exists()


def test_the_flags(capsys):
    assert parse(["--report_to", "tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]
    for given in (["all"], ["none", "wandb"]):
        with pytest.raises(SystemExit):
            parse(["--report_to", *given])
        assert "none, tensorboard, wandb, or tensorboard wandb was expected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--overwrite_output_dir", "--resume", "latest"])
    assert "--resume goes on: choose one of them" in capsys.readouterr().err
