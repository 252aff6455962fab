"""Curves, sampled answers and configuration for TensorBoard and Weights & Biases: --report_to."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Config
from trainer.reporting.console import say
from trainer.reporting.files import EVALUATIONS, METRICS, SAMPLES, STARTS

if TYPE_CHECKING:
    from trainer.job import Job

RUN_ID = "wandb_run_id"  # the file in --output_dir by which a resumed run goes on with the same W&B run
SUFFIX = ".markstep"  # of the names of our event files
EVENTS = f"events.out.tfevents.*{SUFFIX}"
PROJECT = "WANDB_PROJECT"


def chosen(config: Config) -> list[str]:
    """The writers of --report_to."""
    return [name for name in config.report_to or () if name != "none"]


def logging_directory(config: Config) -> Path:
    """Where TensorBoard's files go."""
    return Path(config.logging_dir or Path(config.output_dir) / "runs")


def files_of_a_run(config: Config) -> list[Path]:
    """What a run writes beside its checkpoints, whether it exists or not."""
    output = Path(config.output_dir)
    names = (METRICS, EVALUATIONS, SAMPLES, STARTS, RUN_ID)
    return [*(output / name for name in names), *sorted(logging_directory(config).glob(EVENTS))]


def check_writers(config: Config) -> None:
    """Raise ValueError where what --report_to needs is not there, or --logging_dir has another run's curves.

    Nothing is written.
    """
    for name in chosen(config):
        found = find_spec(name)
        if found is None or found.origin is None:  # W&B makes folders of its name, which are no package
            raise ValueError(
                f'--report_to {name}: {name} is not installed: `pip install -e ".[{name}]"` in the '
                "repository's directory, or --report_to none"
            )
        if name == "wandb":
            _check_wandb()
        else:
            _check_directory(config, logging_directory(config))


def _check_directory(config: Config, directory: Path) -> None:
    parent = directory
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--logging_dir {directory} cannot be made or written to: a directory was expected")
    if any(directory.glob(EVENTS)) and not (config.resume or config.overwrite_output_dir):
        raise ValueError(
            f"--logging_dir {directory} holds TensorBoard's files of another run, and curves would be mixed: "
            "choose another"
        )


def _check_wandb() -> None:
    import wandb

    online = os.environ.get("WANDB_MODE", "online") == "online"
    if online and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "--report_to wandb: no API key is known: run `wandb login`, or set WANDB_MODE=offline, which "
            "keeps the run in --output_dir until `wandb sync`"
        )


class TensorBoard:
    """Writes event files. A resumed run hides what an earlier one wrote after the same step (purge_step)."""

    def __init__(self, job: Job, first_step: int, logged: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(
            str(logging_directory(job.config)), purge_step=first_step + 1, filename_suffix=SUFFIX
        )
        flags = asdict(job.config)
        plain = {name: value for name, value in flags.items() if isinstance(value, bool | int | float | str)}
        for summary in hparams(plain, {}):  # add_hparams would make a run of its own
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("configuration", _as_code(json.dumps(flags, indent=1)), first_step)
        self._writer.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        for number, sample in enumerate(samples, 1):
            parts = (f"**{name}**\n\n{_as_code(text)}" for name, text in sample.items())
            self._writer.add_text(f"samples/{number}", "\n\n".join(parts), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class WandB:
    """Writes to a run of Weights & Biases; a resumed run goes on with the one of --output_dir.

    W&B takes no step again that it has: the values of the first time stay. Offline it does not say which it
    has, and those are taken for it that were `logged`.
    """

    def __init__(self, job: Job, first_step: int, logged: int):
        import wandb

        config, path = job.config, Path(job.config.output_dir, RUN_ID)
        resumes = config.resume and path.exists()
        run_id = path.read_text(encoding="utf-8").strip() if resumes else secrets.token_hex(4)
        path.write_text(run_id + "\n", encoding="utf-8")
        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get(PROJECT, "markstep"),
            id=run_id,
            name=config.run_name,
            dir=config.output_dir,
            config=asdict(config),
            resume="allow",
        )
        before = logged if resumes and self._run.offline else -1
        self._done = self._run.step - 1 if self._run.resumed else before

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step > self._done:
            self._run.log(values, step=step)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        if step > self._done and samples:
            rows = [list(sample.values()) for sample in samples]
            self._run.log({"samples": self._table(columns=list(samples[0]), data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable] = {"tensorboard": TensorBoard, "wandb": WandB}


class Curves:
    """The writers of --report_to. One that fails is left out from then on, with a warning.

    The run begins after `first_step` steps; an earlier one that it continues had logged up to step `logged`.
    """

    def __init__(self, job: Job, first_step: int, logged: int):
        self._writers = {}
        for name in chosen(job.config):
            self._try(name, lambda name=name: self._open(name, job, first_step, logged))

    def _open(self, name, *arguments):
        self._writers[name] = WRITERS[name](*arguments)

    def step(self, record: dict) -> None:
        """Add a line of metrics.jsonl: train/loss and so on."""
        values = dict(record)
        self._scalars(values.pop("step"), {f"train/{key}": value for key, value in values.items()})

    def evaluation(self, record: dict, samples: list[dict[str, str]]) -> None:
        """Add a line of eval.jsonl, eval/loss and so on, and the answers."""
        values = dict(record)
        step = values.pop("step")
        self._scalars(step, {f"eval/{key.removeprefix('eval_')}": value for key, value in values.items()})
        self._each("samples", step, samples)

    def close(self) -> None:
        """Let the writers end."""
        self._each("close")

    def _scalars(self, step, values):
        known = {name: value for name, value in values.items() if value is not None}
        self._each("scalars", step, known)

    def _each(self, method, *arguments):
        for name, writer in list(self._writers.items()):
            self._try(name, lambda writer=writer: getattr(writer, method)(*arguments))

    def _try(self, name, call):
        try:
            call()
        except Exception as error:  # of the network, the disk, the service: none of them is the training
            self._writers.pop(name, None)
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            say(f"warning: --report_to {name} failed, and gets nothing more of this run: {what}", sys.stderr)
