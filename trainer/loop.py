"""The training loop: read it from top to bottom, change it, run `torchrun trainer/main.py`.

Every rank runs this file: as a process on Neuron, as a thread on XLA:CPU. Operations on the device are
recorded, not run. `runtime.mark_step(name, function, *inputs)` calls the function, ends the graph that it
recorded, compiles it if it is new, and starts it. Two rules keep the graphs few and equal on all ranks: what
depends on the rank or the step is data in a tensor, and values are read only after a mark_step.
"""

from collections.abc import Iterable

import torch

from data.loader import BEGINNING, Loader, Position, Prefetcher
from parallel.collectives import all_reduce
from parallel.gradients import all_finite, clip_gradients, global_norm
from parallel.runtime import Runtime
from trainer.build import TrainState, build_state
from trainer.checkpoint.writer import Saver
from trainer.evaluation import evaluate
from trainer.job import Job
from trainer.nonfinite import FiniteCheck
from trainer.optimizer import learning_rate
from trainer.pipelined import forward_backward_in_ticks, without_mark_step
from trainer.reference import add_reference
from trainer.reporting.metrics import Metrics
from trainer.reporting.samples import Samples
from trainer.stopping import Stopping

Batch = dict[str, torch.Tensor]


def run(runtime: Runtime, job: Job) -> TrainState:
    """Train and evaluate as `job.config` says, on one rank; returns what the last step left."""
    config = job.config
    runtime.watch_graphs(config.on_recompile)
    runtime.replay_graphs(config.replay)
    state = build_state(runtime, job)  # trainer/build.py: model, LoRA, optimizer
    start = job.resume.position if job.resume else BEGINNING
    first_step = start.step
    loader, eval_loader = make_loaders(state, job, start)
    batches = Prefetcher(loader, runtime.upload)
    samples = Samples(runtime, state.model, job, state.mesh.tp)
    metrics = Metrics(runtime, job, first_step, loader)
    runtime.mark_step("build")
    # What the objective needs to know of the model before it is trained: trainer/reference.py.
    reference = add_reference(runtime, state, job, {"train": loader, "evaluate": eval_loader})
    saver = Saver(runtime, state.mesh, job, state.optimizer, reference)
    stopping = Stopping(runtime, job)
    finite = FiniteCheck(runtime, state, loader, saver, forward_backward)
    if job.resume:
        job.resume.close()  # all ranks have read what they need

    # Evaluate before the first step: what the model can do untrained, and no graph is left to compile later.
    if eval_loader:
        evaluation = evaluate(runtime, state.model, eval_loader, state.mesh, state.objective)
        metrics.evaluation(first_step, evaluation, samples.generate())

    for step in range(first_step, job.total_steps if config.do_train else first_step):
        runtime.begin_step(step + 1)
        state.model.train()
        last = step + 1 == job.total_steps
        lr = learning_rate(config, step, job.total_steps)
        scalars = state.optimizer.scalars(step, lr).to(runtime.device)
        stop_request = stopping.request(saver.seconds).to(runtime.device)
        report, stop_requests = train_step(runtime, state, batches.step(step, last), scalars, stop_request)

        # Values are read one step late, so that the host waits for the step before and not for this one.
        metrics.hold(step + 1, lr, batches.waited, saver.stalled, report)
        finite.hold(step + 1, report)  # raises after a step that was not finite: trainer/nonfinite.py
        stop = stopping.should_stop(stop_requests)
        saves = saver.saves_after(step + 1, last or stop)  # raises where the save before has failed
        evaluates = eval_loader and not stop and (last or config.evaluates_after(step + 1, saves))
        eval_loss = None
        if saves or evaluates:
            metrics.flush()
            finite.flush()
        if evaluates:
            evaluation = evaluate(runtime, state.model, eval_loader, state.mesh, state.objective)
            metrics.evaluation(step + 1, evaluation, samples.generate())
            eval_loss = evaluation.loss
        if saves:
            saver.save(loader.position(step + 1), eval_loss)  # the host waits for its copy of the state
        if saver.stalled:
            metrics.restart_clock()
        if stop and not last:
            metrics.stopped(step + 1)
            batches.close()
            break
    saver.wait()
    metrics.close()
    return state


def train_step(
    runtime: Runtime,
    state: TrainState,
    micro_batches: Iterable[Batch],
    scalars: torch.Tensor,
    stop_request: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step. What is between two mark_steps is a function; Config.graphs says how often each one
    runs.

    Inputs and results are those of `update`. The state changes in place.
    """
    if not state.config.graph_per_micro_batch:
        return runtime.mark_step("step", whole_step, state, list(micro_batches), scalars, stop_request)
    for batch in micro_batches:
        if state.schedule.ticks:
            forward_backward_in_ticks(state, batch, runtime.mark_step)  # trainer/pipelined.py
        else:
            runtime.mark_step("micro_batch", forward_backward, state, batch)
    return runtime.mark_step("update", update, state, scalars, stop_request)


def whole_step(
    state: TrainState, micro_batches: list[Batch], scalars: torch.Tensor, stop_request: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step as one graph: with one micro-batch, or under --mark_step step."""
    for batch in micro_batches:
        if state.schedule.ticks:
            forward_backward_in_ticks(state, batch, without_mark_step)
        else:
            forward_backward(state, batch)
    return update(state, scalars, stop_request)


def forward_backward(state: TrainState, batch: Batch) -> None:
    """Add the gradients of the *sum* of a micro-batch's losses, and its counts, to the accumulator."""
    model = state.model
    hidden = model.hidden_states(
        batch["input_ids"], batch["position_ids"], batch["segment_ids"], batch["row_seeds"]
    )
    loss_sum, counts = state.objective.loss_and_counts(model, hidden, batch)  # trainer/objective.py
    loss_sum.backward()
    state.accumulator.add(counts)


def update(
    state: TrainState, scalars: torch.Tensor, stop_request: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce the gradients over all ranks, clip them, update the weights.

    scalars [3] are the optimizer's for this step; stop_request [1] is 1 where this rank has to stop. Returns
    what the host reads a step later: (report, the sum of all ranks' stop requests [1]). The report is fp32:
    gradient norm, units (of SFT, target tokens), tokens, and the mean of each of the objective's FIGURES.
    """
    mesh, buckets, optimizer, accumulator = state.mesh, state.buckets, state.optimizer, state.accumulator

    # Reduction. Dividing by the units of all ranks and micro-batches (target tokens, say) makes it the mean
    # over those of the step.
    counts = all_reduce(accumulator.counts, mesh.dp)
    units = counts[0:1].clamp(min=1.0)
    gradients = [grad_sum / units for grad_sum in buckets.reduce(accumulator.grad_sums)]

    # Clipping and update of fp32 master weights, from which the parameters are rounded; under --zero_1 of
    # this rank's part.
    grad_norm = global_norm(buckets, gradients)
    if state.config.max_grad_norm:
        gradients = clip_gradients(gradients, grad_norm, state.config.max_grad_norm)
    report = torch.cat([grad_norm, counts[:2], counts[2:] / units])
    # A step that is not finite changes neither weights nor moments: --on_nonfinite.
    applies = None if state.config.on_nonfinite == "ignore" else all_finite(report)
    optimizer.step(gradients, scalars, applies)
    buckets.set_parameters(optimizer.weights, applies)
    accumulator.reset()
    return report, all_reduce(stop_request, mesh.world)


def make_loaders(state: TrainState, job: Job, start: Position) -> tuple[Loader, Loader | None]:
    """The loaders of training rows from `start` on, and of held-out rows."""
    config, dp = job.config, state.mesh.dp
    layout = {"dp_rank": dp.rank(), "dp_size": dp.size(), "seed": config.seed}
    loader = Loader(
        job.train_rows,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        start=start,
        **layout,
    )
    if not job.eval_rows:
        return loader, None
    return loader, Loader(
        job.eval_rows, batch_size=config.per_device_eval_batch_size, accumulation=1, **layout
    )
