"""The log-probabilities of all answers under the model before training: what DPO compares with.

They are computed once, by the forward of the evaluation, so that no second model is in memory: with LoRA the
model before training is its base (B is 0), or the adapter that a run goes on from; in full training it has
the starting weights. Every checkpoint has them, and a run that resumes reads them there: the checkpoint's
identity says of which base, adapter and data they are. On another topology they stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from data.loader import Loader
from model.llama import Llama
from parallel.mesh import Mesh
from parallel.runtime import Runtime
from trainer.checkpoint.names import REFERENCE
from trainer.evaluation import forward, scheduled_batches
from trainer.objective import answer_logps

if TYPE_CHECKING:
    from trainer.build import TrainState
    from trainer.job import Job


def add_reference(
    runtime: Runtime, state: TrainState, job: Job, loaders: dict[str, Loader | None]
) -> dict[str, np.ndarray]:
    """Give the rows of the loaders their reference, where the objective needs one; returns it by their names.

    Every rank calls this before the first step. It reads the checkpoint that the run resumes from, or else
    computes: the host then waits for each batch.
    """
    if not state.objective.needs_reference:
        return {}
    loaders = {name: loader for name, loader in loaders.items() if loader}
    # Of the same rows: the data are a part of the checkpoint's identity.
    reference = load_file(job.resume.path / REFERENCE) if job.resume else {}
    for name, loader in loaders.items():
        if not job.resume:
            dp, rows = state.mesh.dp, loader.rows
            layout = {"dp_rank": dp.rank(), "dp_size": dp.size(), "seed": 0}
            batch_size = job.config.per_device_train_batch_size  # one graph for both kinds of rows
            batches = Loader(rows, batch_size=batch_size, accumulation=1, **layout)
            reference[name] = compute_reference(runtime, state.model, state.mesh, batches)
        loader.rows = replace(loader.rows, values=reference[name])
    return reference


def compute_reference(runtime: Runtime, model: Llama, mesh: Mesh, loader: Loader) -> np.ndarray:
    """The log-probability of each piece of the loader's rows under the model as it is, fp32 [pieces]."""
    rows = loader.rows
    model.eval()
    values, begin = np.zeros(len(rows.pieces.lengths), np.float32), 0
    measure = AnswerLogps(rows.segments, loader.global_batch)
    for batch, plan in scheduled_batches(runtime, model, loader):
        count = len(batch["input_ids"])
        batch["slots"] = (torch.arange(count) + count * mesh.dp.rank()).to(runtime.device)
        sums = torch.zeros(measure.slots * measure.segments).to(runtime.device)
        forward(runtime, "reference", model, mesh, measure, plan, batch, sums)
        found = np.array(runtime.read(sums), np.float32).reshape(measure.slots, -1)
        for group, row in zip(rows.groups[begin : begin + measure.slots], found, strict=False):
            values[group] = row[: len(group)]
        begin += measure.slots
    return values


@dataclass(frozen=True)
class AnswerLogps:
    """In place of an objective: counts the log-probability of each segment of each row of a global batch.

    `slots` is the number of its rows; batch["slots"] [batch] has the numbers of this rank's.
    """

    segments: int
    slots: int

    def counts(self, model: Llama, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp32 [slots x segments]; 0 for the rows of other ranks."""
        logps, _ = answer_logps(model, hidden, batch, self.segments)
        one_hot = torch.arange(self.slots, device=logps.device).unsqueeze(-1) == batch["slots"]
        return (one_hot.float() @ logps).reshape(-1)


def write_reference(reference: dict[str, np.ndarray] | None, directory: Path) -> None:
    """Write the file of a checkpoint, where there is a reference: fp32 [pieces] of the rows to `train` and
    `evaluate` on."""
    if reference:
        save_file(reference, directory / REFERENCE)
