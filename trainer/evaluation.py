"""The loss of held-out rows."""

import torch

from data.loader import Loader
from model.llama import Llama
from model.stage import forward_tick, schedule
from parallel.collectives import all_reduce
from parallel.mesh import Mesh
from parallel.runtime import Runtime
from trainer.objective import FIGURES, loss_and_counts


def evaluate(runtime: Runtime, model: Llama, loader: Loader, mesh: Mesh) -> tuple[float, int]:
    """(loss per target token, target tokens) over all rows of the loader and all data parallel ranks.

    The host waits for the device at the end.
    """
    model.eval()
    counts, plan = torch.zeros(2 + len(FIGURES)).to(runtime.device), None
    for batch in loader.evaluation_batches():
        batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
        plan = plan or schedule(model, *batch["input_ids"].shape, runtime.device)
        if not plan.ticks:
            runtime.mark_step("evaluation", evaluate_batch, model, mesh, batch, counts)
        output = plan.zero_activations
        for tick in plan.ticks:
            output = runtime.mark_step("evaluation", evaluate_tick, model, mesh, batch, counts, tick, output)
    target_tokens, _, loss_sum, *_ = runtime.read(counts)
    return loss_sum / max(target_tokens, 1.0), int(target_tokens)


@torch.no_grad()
def evaluate_batch(model: Llama, mesh: Mesh, batch: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
    """Add what is counted of a batch on all data parallel ranks to `counts`, in place."""
    hidden = model.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
    counts.add_(all_reduce(loss_and_counts(model, hidden, batch)[1], mesh.dp))


@torch.no_grad()
def evaluate_tick(
    model: Llama,
    mesh: Mesh,
    batch: dict[str, torch.Tensor],
    counts: torch.Tensor,
    tick: torch.Tensor,
    previous_output: torch.Tensor,
) -> torch.Tensor:
    """One tick of a batch through pipeline stages: as evaluate_batch for the micro-batch that it finishes.

    Returns this stage's output, which is the next tick's `previous_output`.
    """
    output = forward_tick(model, batch, tick, previous_output).stage_output
    rows = model.pipeline.finished_microbatch(batch, tick)
    counts.add_(all_reduce(loss_and_counts(model, output, rows)[1], mesh.dp))
    return output
