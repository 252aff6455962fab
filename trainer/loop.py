"""The training loop: build, the step, evaluation. Read it from top to bottom, change it, run `torchrun
trainer/main.py`.

Every rank runs this function, a process each on Neuron, a thread each on XLA:CPU. Operations on the device
are recorded, not run, until `runtime.mark_step()`, which ends a graph, compiles it if it is new, and starts
it. Two rules keep the graphs few and equal on all ranks: what depends on the rank or the step is data, and
values are read only after a mark_step.
"""

import torch

from data.loader import BEGINNING, Loader, Prefetcher
from model.llama import Llama
from model.lora import add_lora
from model.stage import finish, forward_tick, schedule
from model.weights.loading import fill
from model.weights.sources import open_weights
from parallel.buckets import Buckets
from parallel.collectives import all_reduce
from parallel.gradients import clip_gradients, global_norm
from parallel.layer_backend import parallel_layers
from parallel.loss import parallel_cross_entropy
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.runtime import Runtime
from parallel.shard import named_shards
from trainer.checkpoint.writer import Saver
from trainer.job import Job
from trainer.metrics import Metrics
from trainer.optimizer import AdamW, learning_rate
from trainer.samples import Samples
from trainer.stopping import Stopping


def run(runtime: Runtime, job: Job) -> None:
    """Train and evaluate as `job.config` says, on one rank."""
    config, device = job.config, runtime.device
    layers = parallel_layers(config.parallel_layers, config.pipeline_parallel_size)
    mesh = layers.create_mesh(
        runtime.rank, runtime.world_size, config.tensor_parallel_size, config.pipeline_parallel_size
    )
    runtime.watch_graphs(config.on_recompile)

    # Model: this rank's shards of its stage's layers, read slice by slice and moved to the device.
    model = Llama(
        job.model_config,
        mesh.tp,
        torch.bfloat16 if config.bf16 else torch.float32,
        gradient_checkpointing=config.checkpointing_mode,
        sequence_parallel=config.divides_sequence,
        layers=layers,
        flash_attention=job.flash_attention,
        pipeline=Pipeline(mesh.pp, mesh.model, config.pipeline_microbatches),
    )
    dropout_seeds = add_lora(model, job.lora) if job.lora else None
    weights = open_weights(
        job.model_directory, job.model_config, config.random_seed, config.depth_scaled_init
    )
    initial = fill(model, weights, device, config.seed, job.read_trained)
    buckets = Buckets([each for each in named_shards(model) if each[1].requires_grad], mesh, config.zero_1)

    # Optimizer and data. The rows of a step are a function of the step and of where the run began or goes on.
    optimizer = AdamW(buckets, config, initial, device)
    del initial
    start = BEGINNING
    if job.resume:
        job.resume.restore(optimizer)
        start = job.resume.position
    first_step = start.step
    layout = {"dp_rank": mesh.dp.rank(), "dp_size": mesh.dp.size(), "seed": config.seed}
    loader = Loader(
        job.train_rows,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        start=start,
        **layout,
    )
    batches = Prefetcher(loader, lambda tensor: tensor.to(device))
    eval_loader = job.eval_rows and Loader(
        job.eval_rows, batch_size=config.per_device_eval_batch_size, accumulation=1, **layout
    )
    samples = Samples(runtime, model, job, mesh.tp)
    metrics = Metrics(runtime, job, first_step, loader)
    saver = Saver(runtime, mesh, job, optimizer)
    stopping = Stopping(runtime, job)
    zeros = torch.zeros(3).to(device)
    ticks, idle = schedule(
        model, config.per_device_train_batch_size, config.max_seq_length, device
    )  # of pipeline stages
    sums = (
        [torch.zeros(shape).to(device) for shape in buckets.shapes] if config.graph_per_micro_batch else None
    )
    runtime.mark_step("build")
    if job.resume:
        job.resume.close()  # all ranks have read what they need

    # Before the first step: what the model can do untrained; and no graph is left to compile later.
    if eval_loader:
        metrics.evaluation(first_step, *evaluate(runtime, model, eval_loader, mesh, zeros), samples.answers())

    for step in range(first_step, job.total_steps if config.do_train else first_step):
        model.train()
        last = step + 1 == job.total_steps
        rate = learning_rate(config, step, job.total_steps)
        scalars = optimizer.scalars(step, rate).to(device)
        wishes = stopping.wish(saver.seconds).to(device)
        totals = zeros  # loss sum, target tokens, tokens

        # Forward and backward. Gradients of the *sum* of the losses add up, in fp32.
        for batch in batches.step(step, last):
            if not ticks:
                if job.lora and job.lora.lora_dropout:
                    dropout_seeds.set(batch["row_seeds"], config.max_seq_length)
                logits = model(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
                losses = parallel_cross_entropy(logits, batch["labels"], model.rank_index, mesh.model)
                losses.sum().backward()
                sums = buckets.take_gradients(sums)
                totals = totals + batch_totals(losses, batch)
                del logits, losses  # what lives at a mark_step is an output of its graph, and takes memory
                if config.graph_per_micro_batch:
                    runtime.mark_step(
                        "micro_batch"
                    )  # one graph for all of them; else they share the graph of the update
            else:  # pipeline stages: all ticks forward, then all backward, from the last to the first
                passages, sent = [], idle
                for tick in ticks:
                    passages.append(forward_tick(model, batch, tick, sent))
                    sent = passages[-1].output
                    if config.graph_per_micro_batch:
                        runtime.mark_step("forward")  # one graph for all of them, and one for all below
                sent = idle
                for tick in reversed(ticks):
                    passage = passages.pop()
                    logits, rows = finish(model, batch, tick, passage.output)
                    losses = parallel_cross_entropy(logits, rows["labels"], model.rank_index, mesh.model)
                    losses.sum().backward()
                    sent = passage.backward(sent)
                    sums = buckets.take_gradients(sums)
                    totals = totals + batch_totals(losses, rows)
                    del passage, logits, rows, losses
                    if config.graph_per_micro_batch:
                        runtime.mark_step("backward")
                del sent

        # Reduction. Dividing by the target tokens of all ranks and micro-batches makes it the mean over the
        # step's tokens.
        totals = all_reduce(totals, mesh.dp)
        target_tokens = totals[1:2].clamp(min=1.0)
        gradients = [total / target_tokens for total in buckets.reduce(sums)]
        sums = [total.zero_() for total in sums] if config.graph_per_micro_batch else None

        # Clipping and update: of fp32 master weights, under --zero_1 this rank's part, to which the
        # parameters are rounded.
        norm = global_norm(buckets, gradients)
        if config.max_grad_norm:
            gradients = clip_gradients(gradients, norm, config.max_grad_norm)
        optimizer.step(gradients, scalars)
        buckets.set_parameters(optimizer.weights)
        del gradients
        values = torch.cat([totals[0:1] / target_tokens, norm, totals[1:]])
        wishes = all_reduce(wishes, mesh.world)
        runtime.mark_step("step", step + 1)

        # Read one step late, so that the host waits for the step before, not for this one.
        metrics.hold(step + 1, rate, batches.waited, saver.stalled, values)
        stop, saver.stalled = stopping.agreed(wishes), 0.0
        eval_loss = None
        if eval_loader and not stop and (last or config.eval_steps and (step + 1) % config.eval_steps == 0):
            metrics.flush()
            eval_loss, counted = evaluate(runtime, model, eval_loader, mesh, zeros)
            metrics.evaluation(step + 1, eval_loss, counted, samples.answers())
        if last or stop or (step + 1) % config.save_steps == 0:
            metrics.flush()
            saver.save(
                loader.position(step + 1), eval_loss
            )  # the host waits until it has a copy of the state
            metrics.restart_clock()
        if stop and not last:
            metrics.stopped(step + 1)
            batches.close()
            break
    saver.wait()
    metrics.close()


@torch.no_grad()
def evaluate(
    runtime: Runtime, model: Llama, loader: Loader, mesh: Mesh, zeros: torch.Tensor
) -> tuple[float, int]:
    """(loss per target token, target tokens) over all rows of the loader, all data parallel ranks. The host
    waits at the end."""
    model.eval()
    totals, start = zeros, None
    for batch in loader.evaluation_batches():
        batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
        start = start or schedule(model, *batch["input_ids"].shape, runtime.device)
        ticks, sent = start
        for tick in ticks or [None]:
            if ticks:
                sent = forward_tick(model, batch, tick, sent).output
                logits, rows = finish(model, batch, tick, sent)
            else:
                logits, rows = model(batch["input_ids"], batch["position_ids"], batch["segment_ids"]), batch
            losses = parallel_cross_entropy(logits, rows["labels"], model.rank_index, mesh.model)
            totals = totals + all_reduce(batch_totals(losses, rows), mesh.dp)
            del logits, rows, losses
            runtime.mark_step("evaluation")
    loss_sum, target_tokens, _ = runtime.read(totals)
    return loss_sum / max(target_tokens, 1.0), int(target_tokens)


def batch_totals(losses: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sum of losses, target tokens, tokens that are no padding], fp32 [3]."""
    counts = [(batch["labels"] != -100).float().sum(), (batch["segment_ids"] > 0).float().sum()]
    return torch.stack([losses.detach().sum(), *counts])
