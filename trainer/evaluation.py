"""The loss of held-out rows, and other sums over all rows that need the forward alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from data.loader import Loader
from model.llama import Llama
from model.stage import Schedule, forward_tick, schedule
from parallel.collectives import all_reduce
from parallel.mesh import Mesh
from parallel.runtime import Runtime
from trainer.objective import Objective, SupervisedFineTuning

Batch = dict[str, torch.Tensor]


class Evaluation(NamedTuple):
    """What was found over all rows: the number of the objective's units, and each of its figures as a mean
    per unit."""

    units: int
    figures: dict[str, float]

    @property
    def loss(self) -> float:
        """The figure `loss`."""
        return self.figures["loss"]


def evaluate(
    runtime: Runtime,
    model: Llama,
    loader: Loader,
    mesh: Mesh,
    objective: Objective = SupervisedFineTuning(),  # noqa: B008  (it has no state)
) -> Evaluation:
    """The objective's figures over all rows of the loader and all data parallel ranks.

    The host waits for the device at the end.
    """
    model.eval()
    counts = torch.zeros(2 + len(objective.FIGURES)).to(runtime.device)
    for batch, plan in scheduled_batches(runtime, model, loader):
        forward(runtime, "evaluation", model, mesh, objective, plan, batch, counts)
    units, _, *sums = runtime.read(counts)
    means = [each / max(units, 1.0) for each in sums]
    return Evaluation(int(units), dict(zip(objective.FIGURES, means, strict=True)))


def scheduled_batches(runtime: Runtime, model: Llama, loader: Loader) -> Iterator[tuple[Batch, Schedule]]:
    """(batch on the device, its ticks) of each evaluation batch of the loader."""
    plan = None
    for batch in loader.evaluation_batches():
        batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
        plan = plan or schedule(model, *batch["input_ids"].shape, runtime.device)
        yield batch, plan


def forward(
    runtime: Runtime,
    graph: str,
    model: Llama,
    mesh: Mesh,
    objective,
    plan: Schedule,
    batch: Batch,
    sums: torch.Tensor,
) -> None:
    """Add `objective.counts` of a batch, over all data parallel ranks, to `sums` in place: a mark_step named
    `graph`, or one for each tick of `plan`."""
    if not plan.ticks:
        runtime.mark_step(graph, forward_batch, model, mesh, objective, batch, sums)
    output = plan.zero_activations
    for tick in plan.ticks:
        output = runtime.mark_step(
            graph, forward_batch_tick, model, mesh, objective, batch, sums, tick, output
        )


@torch.no_grad()
def forward_batch(model: Llama, mesh: Mesh, objective, batch: Batch, sums: torch.Tensor) -> None:
    """Add what is counted of a batch on all data parallel ranks to `sums`, in place."""
    hidden = model.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
    sums.add_(all_reduce(objective.counts(model, hidden, batch), mesh.dp))


@torch.no_grad()
def forward_batch_tick(
    model: Llama,
    mesh: Mesh,
    objective,
    batch: Batch,
    sums: torch.Tensor,
    tick: torch.Tensor,
    previous_output: torch.Tensor,
) -> torch.Tensor:
    """One tick of a batch through pipeline stages: as forward_batch for the micro-batch that it finishes.

    Returns this stage's output, which is the next tick's `previous_output`.
    """
    output = forward_tick(model, batch, tick, previous_output).stage_output
    rows = model.pipeline.finished_microbatch(batch, tick)
    sums.add_(all_reduce(objective.counts(model, output, rows), mesh.dp))
    return output
