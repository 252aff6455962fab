"""From a configuration to what a step works on: the mesh, the model, its optimizer and accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraConfig, add_lora
from model.stage import Schedule, schedule
from model.weights.loading import fill
from model.weights.sources import open_weights
from parallel import layers as native
from parallel.buckets import Buckets
from parallel.gradients import GradientAccumulator
from parallel.layer_backend import parallel_layers
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.runtime import Runtime, devices, meet
from parallel.shard import named_shards
from trainer.config import Config
from trainer.dataset import check_row_length
from trainer.objective import Objective, SupervisedFineTuning, objective_of
from trainer.optimizer import AdamW, new_state, weights_dtype

if TYPE_CHECKING:
    from trainer.job import Job


@dataclass
class TrainState:
    """What the graphs of a step read and change in place, on one rank.

    `schedule` has the ticks of a micro-batch through the pipeline stages; none where there is one stage.
    """

    config: Config
    mesh: Mesh
    model: Llama
    buckets: Buckets
    accumulator: GradientAccumulator
    schedule: Schedule
    optimizer: AdamW | None = None
    objective: Objective = SupervisedFineTuning()


def build_model(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    lora: LoraConfig | None = None,
    layers: ModuleType = native,
    flash_attention: bool = False,
) -> Llama:
    """This rank's model on the meta device, as it is trained; raises ValueError where the mesh cannot divide
    it."""
    check_row_length(config, model_config)
    model = Llama(
        model_config,
        mesh.tp,
        torch.bfloat16 if config.bf16 else torch.float32,
        gradient_checkpointing=config.checkpointing_mode,
        sequence_parallel=config.divides_sequence,
        layers=layers,
        flash_attention=flash_attention,
        pipeline=Pipeline(mesh.pp, mesh.model, config.pipeline_microbatches),
    )
    if lora:
        add_lora(model, lora)
    return model


def buckets_of(model: Llama, mesh: Mesh, config: Config) -> Buckets:
    """The buckets of what is trained of a model."""
    trained = [each for each in named_shards(model) if each[1].requires_grad]
    return Buckets(trained, mesh, config.zero_1)


def buckets_before_start(
    config: Config, model_config: ModelConfig, world_size: int, lora: LoraConfig | None
) -> Buckets | None:
    """Where each rank is a process: the buckets that this process's rank will have, before it has a device.

    Its place in the mesh is the one of our layers. None where the ranks are threads.
    """
    if not devices.ranks_are_processes():
        return None
    sizes = config.tensor_parallel_size, config.pipeline_parallel_size
    mesh = Mesh.create(meet().rank, world_size, *sizes)
    return buckets_of(build_model(config, model_config, mesh, lora), mesh, config)


def build_state(runtime: Runtime, job: Job) -> TrainState:
    """The state before the first step of this run, on one rank: new, or as the checkpoint has it that the run
    resumes.

    The rank reads its own slices of the weights and nothing else, and of a checkpoint its share, which other
    ranks need, too: they meet in a gather. Nothing is executed: a mark_step has to follow.
    """
    config, device = job.config, runtime.device
    layers = parallel_layers(config.parallel_layers, config.pipeline_parallel_size)
    mesh = layers.create_mesh(
        runtime.rank, runtime.world_size, config.tensor_parallel_size, config.pipeline_parallel_size
    )
    model = build_model(config, job.model_config, mesh, job.lora, layers, job.flash_attention)
    weights = open_weights(
        job.model_directory, job.model_config, config.random_seed, config.depth_scaled_init
    )
    read_trained = job.adapter.read if job.adapter else None
    initial = fill(model, weights, device, config.seed, read_trained, values_follow=bool(job.resume))
    buckets = buckets_of(model, mesh, config)
    if job.resume:
        state = job.resume.part(buckets).gather(buckets, weights_dtype(config), device)
        buckets.set_parameters(state[0])
    else:
        state = new_state(buckets, config, initial, device)
    optimizer = AdamW(buckets, config, state)
    objective = objective_of(config)
    counts = 2 + len(objective.FIGURES)
    accumulator = GradientAccumulator(buckets, counts, device, config.graph_per_micro_batch)
    ticks = schedule(model, config.per_device_train_batch_size, config.max_seq_length, device)
    return TrainState(config, mesh, model, buckets, accumulator, ticks, optimizer, objective)
