"""Llama's relatives against transformers: logits of rows packed and alone, and every gradient."""

import pytest
import torch

from tests.support.models import RELATIVES, save_model
from tests.support.on_ranks import on_ranks

pytestmark = pytest.mark.process

LENGTHS, ROW = (90, 7, 31), 144  # of three examples that share a row, and are alone in one; windows are of 24
LOGITS = [(1, 1), (1, 2), (1, 4), (2, 2)]  # (stages, tensor parallel ranks)
# With a backward: (stages, tensor parallel ranks, sequence parallel, gradient checkpointing)
GRADIENTS = [(1, 4, False, "none"), (1, 2, True, "full"), (2, 2, True, "none")]


def rows():
    """Rows [4, ROW] of the three examples together, and of each alone, padded. Half of the tokens train."""
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(0, 512, (length,), generator=generator) for length in LENGTHS]
    batch = {
        name: torch.zeros(4, ROW, dtype=torch.long) for name in ("input_ids", "position_ids", "segment_ids")
    }
    batch["labels"] = torch.full((4, ROW), -100)
    starts = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]
    for number, (example, start) in enumerate(zip(examples, starts, strict=True)):
        for row, first in ((0, start), (number + 1, 0)):
            where = slice(first, first + len(example))
            batch["input_ids"][row, where] = example
            batch["position_ids"][row, where] = torch.arange(len(example))
            batch["segment_ids"][row, where] = number + 1
            batch["labels"][row, where] = example.flip(0).where(example % 2 == 0, -100)
    batch["row_seeds"] = torch.zeros(4, dtype=torch.int32)
    return batch, examples, starts


def computed(runtime, directories):
    """Of the model in each directory: ({LOGITS: logits}, {GRADIENTS: pieces of gradients with their shards},
    compilations)."""
    from pathlib import Path

    from model.attention import blockwise
    from model.config import ModelConfig
    from model.weights.loading import check_weights
    from model.weights.sources import SafetensorsFiles

    blockwise.BLOCKS, blockwise.KEYS = (32, 64), 16  # so that windows hide keys of whole blocks
    found, before = [], 0
    for directory in map(Path, directories):
        config, files = ModelConfig.from_pretrained(directory), SafetensorsFiles(directory)
        check_weights(config, files)
        logits = {case: _logits(runtime, config, files, *case) for case in LOGITS}
        gradients = {case: _gradients(runtime, config, files, *case) for case in GRADIENTS}
        found.append((logits, gradients, runtime.compilations() - before))
        before += found[-1][2]
    return found


def _logits(runtime, config, files, stages, tp):
    """The logits [4, ROW, vocabulary] of the rows; one stage after the other computes them."""
    from model.llama import Llama
    from model.weights.loading import fill
    from parallel.collectives import all_gather, permute
    from parallel.mesh import Mesh
    from parallel.pipeline import Pipeline

    mesh = Mesh.create(runtime.rank, runtime.world_size, tp, stages)
    model = Llama(config, mesh.tp, pipeline=Pipeline(mesh.pp, mesh.model))
    fill(model, files, runtime.device, seed=0)
    batch = {name: tensor.to(runtime.device) for name, tensor in rows()[0].items()}
    with torch.no_grad():
        inputs = model.layer_inputs(batch["position_ids"], batch["segment_ids"])
        x = model.stage(model.embed(batch["input_ids"]), inputs)
        for _ in range(1, stages):
            x = model.stage(permute(x, mesh.pp, 1), inputs)
        logits = all_gather(model.head(x, 4), model.vocabulary_group, -1)
    runtime.mark_step()
    return logits.cpu()[..., : config.vocab_size]


def _gradients(runtime, config, files, stages, tp, sequence_parallel, checkpointing):
    """{name: (the gradient of this rank's slice, shard)} of the sum of the rows' losses."""
    from model.llama import Llama
    from model.stage import schedule
    from model.weights.loading import fill
    from parallel.buckets import Buckets
    from parallel.gradients import GradientAccumulator
    from parallel.mesh import Mesh
    from parallel.pipeline import Pipeline
    from parallel.shard import named_shards
    from trainer.build import TrainState
    from trainer.loop import forward_backward
    from trainer.objective import SupervisedFineTuning
    from trainer.pipelined import forward_backward_in_ticks

    mesh = Mesh.create(runtime.rank, runtime.world_size, tp, stages)
    model = Llama(
        config,
        mesh.tp,
        gradient_checkpointing=checkpointing,
        sequence_parallel=sequence_parallel,
        pipeline=Pipeline(mesh.pp, mesh.model, 2 if stages > 1 else 1),
    )
    fill(model, files, runtime.device, seed=0)
    batch = {name: tensor.to(runtime.device) for name, tensor in rows()[0].items()}
    buckets = Buckets(list(named_shards(model)), mesh)
    accumulator = GradientAccumulator(
        buckets, 2 + len(SupervisedFineTuning.FIGURES), runtime.device, stages > 1
    )
    ticks = schedule(model, 4, ROW, runtime.device)
    state = TrainState(None, mesh, model, buckets, accumulator, ticks)
    if stages > 1:
        forward_backward_in_ticks(state, batch, runtime.mark_step)
    else:
        forward_backward(state, batch)
    gradients = buckets.reduce(accumulator.grad_sums)
    runtime.mark_step()
    on_host = [
        gradient.cpu() / mesh.dp.size() for gradient in gradients
    ]  # data parallel ranks have equal rows
    return {
        name: (buckets.own_piece(name, on_host)[0], shard)
        for name, shard in buckets.shards.items()
        if not shard.padding
    }


def dense(model):
    """{name: gradient of the sum of all losses}, with each example alone, in float64 but for what
    transformers insists to have in fp32."""
    batch, examples, _ = rows()
    model.double().zero_grad()
    for number, example in enumerate(examples):
        labels = batch["labels"][number + 1, : len(example)]
        loss = torch.nn.functional.cross_entropy(model(example[None]).logits[0], labels, reduction="sum")
        (2 * loss).backward()  # it is in the packed row, too
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    """{relative: (transformers' model, what each rank computed)}."""
    directories = {name: tmp_path_factory.mktemp("model") for name in RELATIVES}
    models = [save_model(directories[name], kind, **changes) for name, (kind, changes) in RELATIVES.items()]
    ranks = on_ranks(computed, 4, directories=[str(each) for each in directories.values()])
    return dict(zip(RELATIVES, zip(models, zip(*ranks, strict=True), strict=True), strict=True))


@pytest.mark.parametrize("name", RELATIVES)
def test_logits_are_those_of_transformers_for_each_example_alone(relatives, name):
    model, ranks = relatives[name]
    _, examples, starts = rows()
    with torch.no_grad():
        expected = [model.float()(example[None]).logits[0] for example in examples]
    for logits_of, _, _ in ranks:
        for case, logits in logits_of.items():
            for number, (start, one) in enumerate(zip(starts, expected, strict=True)):
                for row, first in ((0, start), (number + 1, 0)):
                    error = (logits[row, first : first + len(one)] - one).abs().max()
                    assert error < 1e-4, f"{name}, (stages, tp) {case}, row {row}: {error}"


@pytest.mark.parametrize("name", RELATIVES)
def test_every_gradient_is_the_dense_one(relatives, name):
    model, ranks = relatives[name]
    expected = dense(model)
    for case in GRADIENTS:
        held = set()
        for _, gradients_of, _ in ranks:
            held |= set(gradients_of[case])
            for parameter, (gradient, shard) in gradients_of[case].items():
                whole = expected[parameter]
                error = (gradient.double() - whole[shard.slices].flatten()).norm() / whole.norm()
                assert error < 1e-5, f"{name}, {case}, {parameter}: {error}"
        assert held == set(expected), case


def test_all_ranks_have_one_graph_of_each_case(relatives):
    """Ranks that trace different graphs stop with an error; here all have compiled as many. (Models of equal
    sizes share the reduction of gradients.)"""
    graphs = len(LOGITS) + sum(3 if stages > 1 else 1 for stages, *_ in GRADIENTS)
    for name, (_, ranks) in relatives.items():
        compilations = {compilations for *_, compilations in ranks}
        assert compilations in ({graphs}, {graphs - 1}), name
