"""Layers, loss and gradient norm against dense ones in float64 on the same weights."""
import pytest
import torch
import torch.nn.functional as F

from tests.on_ranks import on_ranks

HIDDEN, MIDDLE, VOCABULARY, BATCH, SEQUENCE = 16, 24, 32, 2, 6


def whole(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64) * 0.3


def data():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    target = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    target[:, 2] = -100
    return ids, target


SHAPES = {"embed.weight": (VOCABULARY, HIDDEN), "up.weight": (MIDDLE, HIDDEN), "up.bias": (MIDDLE,),
          "down.weight": (HIDDEN, MIDDLE), "down.bias": (HIDDEN,), "mix.weight": (HIDDEN, HIDDEN),
          "head.weight": (VOCABULARY, HIDDEN)}


def sharded(runtime):
    """{tp: losses, gradients with their shards, and the global norm of a small network of every layer}, on one rank of four."""
    from torch import nn

    from parallel.gradients import clip_gradients, global_norm
    from parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, named_shards
    from parallel.loss import parallel_cross_entropy
    from parallel.mesh import Mesh
    found = {}
    for tp in (1, 2, 4):
        mesh = Mesh.create(runtime.rank, runtime.world_size, tp)
        group = {"tensor_model_parallel_group": mesh.tp}
        net = nn.ModuleDict({
            "embed": ParallelEmbedding(VOCABULARY, HIDDEN, **group),
            "up": ColumnParallelLinear(HIDDEN, MIDDLE, gather_output=False, **group),
            "down": RowParallelLinear(MIDDLE, HIDDEN, input_is_parallel=True, **group),
            "mix": ColumnParallelLinear(HIDDEN, HIDDEN, bias=False, **group),
            "head": ColumnParallelLinear(HIDDEN, VOCABULARY, bias=False, gather_output=False, **group)})
        for name, parameter, shard in named_shards(net, mesh.tp):
            parameter.data = whole(name, *shard.global_shape)[shard.slices].float().clone()
        net.to(runtime.device)
        ids, target = (tensor.to(runtime.device) for tensor in data())
        x = net["embed"](ids)
        x = x + net["down"](F.silu(net["up"](x)))
        x = net["mix"](x)
        losses = parallel_cross_entropy(net["head"](x), target, net["head"].rank_index, mesh.tp)
        losses.sum().backward()
        named = list(named_shards(net, mesh.tp))
        parameters = [parameter for _, parameter, _ in named]
        gradients = {name: (parameter.grad.clone(), shard.slices) for name, parameter, shard in named}
        norm = global_norm(parameters, [shard for *_, shard in named], mesh.tp)
        clip_gradients(parameters, norm, 0.5)
        runtime.mark_step()
        found[tp] = {"losses": losses.detach().cpu(), "norm": norm.cpu(),
                     "gradients": {name: (gradient.cpu(), slices) for name, (gradient, slices) in gradients.items()},
                     "clipped": {name: parameter.grad.cpu() for name, parameter, _ in named}}
    return found, runtime.compilations()


def test_layers_equal_dense_ones():
    dense = {name: whole(name, *shape).requires_grad_() for name, shape in SHAPES.items()}
    ids, target = data()
    x = F.embedding(ids, dense["embed.weight"])
    x = x + F.linear(F.silu(F.linear(x, dense["up.weight"], dense["up.bias"])), dense["down.weight"], dense["down.bias"])
    logits = F.linear(F.linear(x, dense["mix.weight"]), dense["head.weight"])
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    losses.sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in dense.items()}
    norm = torch.nn.utils.clip_grad_norm_(dense.values(), 0.5)
    for found, compilations in on_ranks(sharded, 4):
        assert compilations == 3
        for result in found.values():
            torch.testing.assert_close(result["losses"].double(), losses.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(result["norm"].double(), norm.reshape(1), rtol=1e-5, atol=0)
            for name, (gradient, slices) in result["gradients"].items():
                part = expected[name][slices]
                assert (gradient.double() - part).norm() <= 1e-5 * expected[name].norm(), name
                assert (result["clipped"][name].double() - dense[name].grad[slices]).norm() <= 1e-5 * norm, name


def test_sizes_that_cannot_be_divided():
    from parallel.layers import ColumnParallelLinear, RowParallelLinear
    from parallel.mesh import Mesh
    group = Mesh.create(0, 4, 4).tp
    with pytest.raises(ValueError, match="output size 6 is not divisible by the tensor parallel size 4"):
        ColumnParallelLinear(8, 6, tensor_model_parallel_group=group)
    with pytest.raises(ValueError, match="divided already"):
        RowParallelLinear(8, 8, tensor_model_parallel_group=group)
    with pytest.raises(ValueError, match="world size 6 is not divisible by --tensor_parallel_size 4"):
        Mesh.create(0, 6, 4)
