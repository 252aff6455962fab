"""Compares all topologies of a world that have as many rows a step.

These are every tensor parallel size that divides a node, 1, 2, 4 and 8 pipeline stages, every gradient
checkpointing, and micro-batches of up to 4 rows: a larger micro-batch only where the smaller one is sure to
fit. ZeRO-1 is on wherever ranks are data parallel: in this model it takes no time and saves memory. A
pipeline has as many micro-batches as the rows of a step allow, at most 4 a stage: then less than a fifth of
the ticks, (P - 1) / (M + P - 1), are idle.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tools.graphs.models import rank_model
from tools.graphs.report import rank_0_mesh
from tools.plan.extrapolate import reports
from tools.plan.instances import Instance
from tools.plan.roofline import Estimate
from tools.plan.step_report import estimate_step
from tools.plan.topology import rows_per_step

LARGEST_MICRO_BATCH = 4
STAGES = 1, 2, 4, 8
MICRO_BATCHES_A_STAGE = 4


def sweep(config, model_config, instance: Instance) -> list[tuple]:
    """[(Config, Estimate)] with as many rows a step as `config`.

    The fastest that is sure to fit comes first, what does not fit last. Raises ValueError where there is no
    topology.
    """
    pairs: list[tuple] = []
    configs = topologies(config, model_config, instance.cores)
    while configs:
        print(f"tracing {len(configs)} topologies ...", file=sys.stderr)
        estimates = [
            (one, estimate_step(report, one, model_config, instance))
            for one, report in zip(configs, reports(configs, model_config), strict=True)
        ]
        pairs += estimates
        configs = [_with_larger_micro_batch(one) for one, each in estimates if _may_grow(one, each)]
    order = ("yes", "perhaps", "no")
    return sorted(pairs, key=lambda pair: (order.index(pair[1].fits), sum(pair[1].seconds)))


def topologies(config, model_config, cores_of_a_node: int) -> list:
    """The Configs that a sweep tries first: micro-batches of one row, as many rows a step as `config`."""
    found = [
        one
        for tp, pp in product(range(1, min(config.world_size, cores_of_a_node) + 1), STAGES)
        if cores_of_a_node % tp == 0
        for one in _divided(config, tp, pp)
        if _can_be_built(one, model_config)
    ]
    if not found:
        raise ValueError(
            f"--sweep: no topology of {config.world_size} ranks has {rows_per_step(config)} rows a step: "
            "raise --gradient_accumulation_steps, which counts for the topology of the other flags"
        )
    return found


def _divided(config, tp: int, pp: int) -> Iterator:
    """The Configs of tp x pp ranks a replica, one for each gradient checkpointing; none where it does not
    divide."""
    dp, rest = divmod(config.world_size, tp * pp)
    rows = rows_per_step(config)
    if rest or rows % dp:
        return
    most = min(rows // dp, MICRO_BATCHES_A_STAGE * pp) if pp > 1 else 1
    micro_batches = max(count for count in range(1, most + 1) if rows // dp % count == 0)
    for checkpointing in ("none", "full"):
        yield replace(
            config,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            num_microbatches=micro_batches,
            per_device_train_batch_size=micro_batches,
            gradient_checkpointing=checkpointing,
            zero_1=dp > 1,
            gradient_accumulation_steps=rows // dp // micro_batches,
        )


def _can_be_built(config, model_config) -> bool:
    """Whether the model's heads, its vocabulary and its layers divide."""
    try:
        rank_model(config, model_config, rank_0_mesh(config))
    except ValueError:
        return False
    return True


def _may_grow(config, estimate: Estimate) -> bool:
    """Whether a micro-batch of twice the rows is worth a trace."""
    return (
        estimate.fits == "yes"
        and config.per_device_train_batch_size // config.pipeline_microbatches < LARGEST_MICRO_BATCH
        and config.gradient_accumulation_steps % 2 == 0
    )


def _with_larger_micro_batch(config):
    return replace(
        config,
        per_device_train_batch_size=2 * config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps // 2,
    )
