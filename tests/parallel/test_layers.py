"""Layers, loss and gradient norm against dense ones in float64 on the same weights."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.on_ranks import on_ranks

HIDDEN, MIDDLE, VOCABULARY, BATCH, SEQUENCE = 16, 24, 32, 2, 8


def whole(name, *shape):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64)
        * 0.3
    )


def data():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    target = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    target[2] = -100
    return ids, target


SHAPES = {
    "embed.weight": (VOCABULARY, HIDDEN),
    "up.weight": (MIDDLE, HIDDEN),
    "up.bias": (MIDDLE,),
    "gate.weight": (MIDDLE, HIDDEN),
    "gate.bias": (MIDDLE,),
    "down.weight": (HIDDEN, MIDDLE),
    "down.bias": (HIDDEN,),
    "head.weight": (VOCABULARY, HIDDEN),
}
SETTINGS = [(1, False, 10**6), (2, False, 10**6), (2, True, 10**6), (4, False, 400), (4, True, 10**6)]


def sharded(runtime):
    """{setting: losses, gradients with their shards, norm and clipped gradients of every layer}, on one rank
    of four.

    The data parallel ranks have the same batch, so their sum is that many times the gradient of one.
    """
    from torch import nn

    from parallel.buckets import Buckets
    from parallel.gradients import clip_gradients, global_norm
    from parallel.layers import (
        ColumnParallelLinear,
        ParallelEmbedding,
        RowParallelLinear,
        column_parallel,
        gather_inputs,
    )
    from parallel.loss import linear_cross_entropy
    from parallel.mesh import Mesh
    from parallel.shard import named_shards

    found = {}
    for tp, sequence_parallel, bucket_bytes in SETTINGS:
        mesh = Mesh.create(runtime.rank, runtime.world_size, tp)
        group = {"tensor_model_parallel_group": mesh.tp, "sequence_parallel_enabled": sequence_parallel}
        net = nn.ModuleDict(
            {
                "embed": ParallelEmbedding(VOCABULARY, HIDDEN, **group),
                "up": ColumnParallelLinear(HIDDEN, MIDDLE, **group),
                "gate": ColumnParallelLinear(HIDDEN, MIDDLE, **group),
                "down": RowParallelLinear(MIDDLE, HIDDEN, input_is_parallel=True, **group),
                "head": ColumnParallelLinear(HIDDEN, VOCABULARY, bias=False, **group),
            }
        )
        for name, parameter, shard in named_shards(net):
            parameter.data = whole(name, *shard.global_shape)[shard.slices].float().clone()
        net.to(runtime.device)
        buckets = Buckets(list(named_shards(net)), mesh, bucket_bytes=bucket_bytes)
        ids, target = (tensor.to(runtime.device) for tensor in data())
        x = net["embed"](ids)
        up, gate = column_parallel(x, [net["up"], net["gate"]])
        x = x + net["down"](F.silu(up) * gate)
        head = net["head"]
        x, _ = gather_inputs(x, [head])
        losses, _ = linear_cross_entropy(
            head.factors(x.flatten(0, 1)), target.flatten(), head.rank_index, VOCABULARY, mesh.tp
        )
        losses = losses.view_as(target)
        losses.sum().backward()
        gradients = [total / mesh.dp.size() for total in buckets.reduce(buckets.take_gradients(None))]
        norm = global_norm(buckets, gradients)
        clipped = clip_gradients(gradients, norm, 0.5)
        runtime.mark_step()
        found[tp, sequence_parallel] = {
            "losses": losses.detach().cpu(),
            "norm": norm.cpu(),
            "buckets": len(buckets.buckets),
            "gradients": {},
            "clipped": {},
        }
        for kind, values in (("gradients", gradients), ("clipped", clipped)):
            values = [value.cpu() for value in values]
            for name, shard in buckets.shards.items():
                elements, first = buckets.own_piece(name, values)
                assert first == 0
                found[tp, sequence_parallel][kind][name] = (elements.view(shard.shape), shard.slices)
    return found, runtime.compilations()


@pytest.mark.process
def test_layers_equal_dense_ones():
    dense = {name: whole(name, *shape).requires_grad_() for name, shape in SHAPES.items()}
    ids, target = data()
    x = F.embedding(ids, dense["embed.weight"])
    up, gate = (F.linear(x, dense[f"{name}.weight"], dense[f"{name}.bias"]) for name in ("up", "gate"))
    x = x + F.linear(F.silu(up) * gate, dense["down.weight"], dense["down.bias"])
    losses = F.cross_entropy(F.linear(x, dense["head.weight"]).transpose(1, 2), target, reduction="none")
    losses.sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in dense.items()}
    norm = torch.nn.utils.clip_grad_norm_(dense.values(), 0.5)
    for found, compilations in on_ranks(sharded, 4):
        assert compilations == len(SETTINGS) == len(found)
        assert found[4, False]["buckets"] > found[4, True]["buckets"] == 3
        for result in found.values():
            torch.testing.assert_close(result["losses"].double(), losses.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(result["norm"].double(), norm.reshape(1), rtol=1e-5, atol=0)
            for name, (gradient, slices) in result["gradients"].items():
                assert (gradient.double() - expected[name][slices]).norm() <= 1e-5 * expected[name].norm(), (
                    name
                )
                clipped, slices = result["clipped"][name]
                assert (clipped.double() - dense[name].grad[slices]).norm() <= 1e-5 * dense[
                    name
                ].grad.norm(), name


def test_sizes_that_cannot_be_divided():
    from parallel.layers import ColumnParallelLinear, RowParallelLinear
    from parallel.mesh import Mesh

    group = Mesh.create(0, 4, 4).tp
    with pytest.raises(
        ValueError, match="the size 6 is not divisible by 4, over which the tensor parallel ranks divide it"
    ):
        ColumnParallelLinear(8, 6, tensor_model_parallel_group=group)
    with pytest.raises(ValueError, match="divided already"):
        RowParallelLinear(8, 8, tensor_model_parallel_group=group)
    with pytest.raises(ValueError, match="world size 6 is not divisible by --tensor_parallel_size 4"):
        Mesh.create(0, 6, 4)


def test_a_parameter_of_no_parallel_layer_is_refused():
    from parallel.layers import ColumnParallelLinear
    from parallel.shard import named_shards

    net = torch.nn.ModuleDict({"up": ColumnParallelLinear(8, 8), "norm": torch.nn.LayerNorm(8)})
    with pytest.raises(
        ValueError, match="the parameter norm.weight belongs to no parallel layer: derive LayerNorm from"
    ):
        list(named_shards(net))
