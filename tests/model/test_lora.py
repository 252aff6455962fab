"""LoRA on sharded layers against dense LoRA in float64, and the values that factors start with."""

import pytest
import torch
import torch.nn.functional as F

from model.lora import LoraConfig, TokenSeeds, hash_token_seeds, initial_factor, keep_mask
from parallel.shard import Shard
from tests.support.on_ranks import on_ranks

HIDDEN, MIDDLE, RANK, BATCH, SEQUENCE, DROPOUT = 16, 24, 4, 2, 8, 0.25
SHAPES = {
    "up.base_layer.weight": (MIDDLE, HIDDEN),
    "up.lora_A.weight": (RANK, HIDDEN),
    "up.lora_B.weight": (MIDDLE, RANK),
    "down.base_layer.weight": (HIDDEN, MIDDLE),
    "down.lora_A.weight": (RANK, MIDDLE),
    "down.lora_B.weight": (HIDDEN, RANK),
}
CONFIG = LoraConfig(RANK, 6.0, DROPOUT, ("up", "down"))


def whole(name, *shape):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64)
        * 0.3
    )


def sharded(runtime):
    """{(tp, sequence parallel): output, gradients of the factors with their slices, feature seeds} on one
    rank of four."""
    from torch import nn

    from model.lora import add_lora
    from parallel.buckets import Buckets
    from parallel.collectives import all_gather
    from parallel.layers import ColumnParallelLinear, RowParallelLinear
    from parallel.mesh import Mesh
    from parallel.shard import named_shards

    found = {}
    for tp, sequence_parallel in ((1, False), (2, False), (2, True), (4, False), (4, True)):
        mesh = Mesh.create(runtime.rank, runtime.world_size, tp)
        layout = {
            "bias": False,
            "tensor_model_parallel_group": mesh.tp,
            "sequence_parallel_enabled": sequence_parallel,
        }
        net = nn.ModuleDict(
            {
                "up": ColumnParallelLinear(HIDDEN, MIDDLE, **layout),
                "down": RowParallelLinear(MIDDLE, HIDDEN, input_is_parallel=True, **layout),
            }
        )
        seeds = add_lora(net, CONFIG)
        for name, parameter, shard in named_shards(net):
            parameter.data = whole(name, *shard.global_shape)[shard.slices].float().clone()
        net.to(runtime.device)
        buckets = Buckets([each for each in named_shards(net) if each[1].requires_grad], mesh)
        seeds.values = hash_token_seeds(torch.tensor([5, 6]).to(runtime.device), SEQUENCE)
        x = whole("x", SEQUENCE, BATCH, HIDDEN).float().flatten(0, 1)
        x = x.chunk(tp)[mesh.tp.rank()] if sequence_parallel else x
        output = net["down"](F.silu(net["up"](x.to(runtime.device))))
        output.square().sum().backward()
        gradients = [total / mesh.dp.size() for total in buckets.reduce(buckets.take_gradients(None))]
        output = all_gather(output.detach(), mesh.tp, 0) if sequence_parallel else output.detach()
        runtime.mark_step()
        gradients = [gradient.cpu() for gradient in gradients]
        found[tp, sequence_parallel] = (
            output.cpu(),
            {
                name: (buckets.own_piece(name, gradients)[0].view(shard.shape), shard.slices)
                for name, shard in buckets.shards.items()
            },
            {name: net[name].feature_seeds.cpu() for name in net},
        )
    return found, runtime.compilations()


@pytest.mark.process
def test_every_factor_has_the_dense_gradient_on_every_rank():
    results = on_ranks(sharded, 4)
    dense = {name: whole(name, *shape).requires_grad_() for name, shape in SHAPES.items()}
    seeds = TokenSeeds()
    seeds.values = hash_token_seeds(torch.tensor([5, 6]), SEQUENCE)

    def lora(name, x, features):
        keep = keep_mask(seeds.values, features, DROPOUT)
        low = F.linear(x * keep / (1 - DROPOUT), dense[f"{name}.lora_A.weight"])
        return F.linear(x, dense[f"{name}.base_layer.weight"]) + 1.5 * F.linear(
            low, dense[f"{name}.lora_B.weight"]
        )

    features = results[0][0][1, False][2]
    expected = lora(
        "down", F.silu(lora("up", whole("x", SEQUENCE, BATCH, HIDDEN), features["up"])), features["down"]
    )
    expected.square().sum().backward()
    for found, compilations in results:
        assert compilations == len(found) == 5
        for output, gradients, _ in found.values():
            torch.testing.assert_close(output.double(), expected.detach().flatten(0, 1), rtol=1e-5, atol=1e-5)
            assert set(gradients) == {name for name in SHAPES if "lora" in name}
            for name, (gradient, slices) in gradients.items():
                part = dense[name].grad[slices]
                assert (gradient.double() - part).norm() <= 1e-5 * part.norm(), name


def test_dropout_drops_what_it_should_and_differs_by_row_position_feature_and_layer():
    seeds = TokenSeeds()
    seeds.values = hash_token_seeds(torch.arange(8), 128)
    layers = [
        (torch.arange(256, dtype=torch.int32) * 0x35EBCA6B ^ salt) & 0x7FFFFFFF for salt in (12345, 777)
    ]
    for probability in (0.1, 0.5):
        masks = torch.stack([keep_mask(seeds.values, layer, probability) for layer in layers]).double()
        assert abs(1 - masks.mean() - probability) < 0.005
        for dimension in range(masks.dim()):
            shifted = masks.roll(1, dimension)
            correlation = torch.corrcoef(torch.stack([masks.flatten(), shifted.flatten()]))[0, 1]
            assert abs(correlation) < 0.01, dimension
            assert masks.mean([d for d in range(masks.dim()) if d != dimension]).std() < 0.05


@pytest.mark.parametrize("tp", [2, 4])
def test_factors_start_as_pefts_do_on_every_topology(tp):
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    reference = inject_adapter_in_model(
        PeftConfig(r=16, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(256, 128))
    )[0]
    theirs = reference.lora_A["default"].weight.detach()
    name, shape = "model.layers.0.mlp.up_proj.lora_A.weight", (16, 256)
    ours = initial_factor(name, Shard(shape), seed=1)
    torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(ours.abs().max(), theirs.abs().max(), rtol=0.01, atol=0)
    parts = [initial_factor(name, Shard(shape, 1, tp, index), seed=1) for index in range(tp)]
    assert torch.equal(torch.cat(parts, 1), ours)
    assert not torch.equal(ours, initial_factor(name, Shard(shape), seed=2))
    assert not torch.equal(ours, initial_factor(name.replace("0", "1"), Shard(shape), seed=1))
    assert not initial_factor(name.replace("lora_A", "lora_B"), Shard((128, 16)), seed=1).any()
    assert not reference.lora_B["default"].weight.any()
