"""The cross entropy by chunks against a dense one in float64, on one, two and four ranks."""

import pytest
import torch
import torch.nn.functional as F

from parallel import loss
from tests.support.on_ranks import on_ranks

FEATURES, LOW = 6, 2
# Chunks of four tokens on one rank and of eight on four, of the first case.
BYTES, TILE = 4 * 4 * 13, 4
# {name: (tokens, vocabulary, what else)}
CASES = {
    "no chunk is full": (9, 13, {}),
    "chunks are full": (32, 16, {}),
    "one token": (1, 13, {}),
    "one column": (7, 4, {}),
    "ranks of padding alone": (10, 3, {}),
    "nothing is a target": (9, 13, {"masked": True}),
    "large logits": (24, 12, {"scale": 300.0}),
    "LoRA": (21, 13, {"low_rank": True}),
    "bf16": (21, 13, {"low_rank": True, "dtype": "bfloat16"}),
}


def data(name):
    """(x and W of each factor in float64, targets, the gradients of the two results)."""
    tokens, vocabulary, more = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < (1.0 if more.get("masked") else 0.2)] = -100
    factors = [
        [torch.randn(size, width, generator=generator).double() for size in (tokens, vocabulary)]
        for width in (FEATURES, LOW)[: 1 + ("low_rank" in more)]
    ]
    factors[0][0] *= more.get("scale", 1.0)
    dtype = getattr(torch, more.get("dtype", "float32"))
    factors = [[each.to(dtype).double().requires_grad_() for each in pair] for pair in factors]
    return factors, target, torch.randn(2, tokens, generator=generator).double(), dtype


def dense(name):
    """(the two results, the gradients of all factors) in float64."""
    factors, target, upstream, _ = data(name)
    logits = sum(x @ weight.t() for x, weight in factors)
    results = [F.cross_entropy(logits, target, reduction="none", ignore_index=-100), logits.logsumexp(-1)]
    torch.autograd.backward(results, list(upstream))
    return torch.stack(results).detach(), [each.grad for pair in factors for each in pair]


def sharded(runtime):
    """{(case, ranks, recomputed): (results, gradients of x summed over the ranks, this rank's of W)}."""
    from parallel.collectives import all_reduce
    from parallel.mesh import Mesh

    loss.CHUNK_BYTES, loss.TILE = BYTES, TILE
    found = {}
    for ranks in (1, 2, 4):
        group = Mesh.create(runtime.rank, runtime.world_size, ranks).tp
        rank_index = torch.tensor([group.rank()]).to(runtime.device)
        for name, (_, vocabulary, _) in CASES.items():
            for recompute in (False, True):
                factors, target, upstream, dtype = data(name)
                columns = -(-vocabulary // ranks)
                mine = slice(group.rank() * columns, (group.rank() + 1) * columns)
                leaves = [
                    (x, F.pad(weight[mine], (0, 0, 0, columns - len(weight[mine]))))
                    for x, weight in ([each.detach() for each in pair] for pair in factors)
                ]
                leaves = [
                    tuple(each.to(dtype).to(runtime.device).requires_grad_() for each in pair)
                    for pair in leaves
                ]
                results = loss.linear_cross_entropy(
                    leaves, target.to(runtime.device), rank_index, vocabulary, group, recompute
                )
                torch.autograd.backward(results, [each.float().to(runtime.device) for each in upstream])
                of_x = [all_reduce(x.grad.float(), group) for x, _ in leaves]
                runtime.mark_step()
                found[name, ranks, recompute] = (
                    torch.stack(results).detach().cpu(),
                    [x.cpu() for x in of_x],
                    [weight.grad.cpu() for _, weight in leaves],
                )
    return found


@pytest.mark.process
def test_results_and_gradients_are_those_of_float64():
    found = on_ranks(sharded, 4)
    for key in found[0]:
        name, ranks, _ = key
        vocabulary = CASES[name][1]
        expected, gradients = dense(name)
        exact = CASES[name][2].get("dtype") is None
        for first in range(0, 4, ranks):
            group = [rank[key] for rank in found[first : first + ranks]]
            for results, of_x, _ in group:
                assert apart(results, expected) < (3e-7 if exact else 0.01), key
                for ours, wanted in zip(of_x, gradients[::2], strict=True):
                    assert apart(ours, wanted) < (2e-6 if exact else 0.03), key
            for number, wanted in enumerate(gradients[1::2]):
                whole = torch.cat([of_weight[number] for _, _, of_weight in group])
                assert not whole[vocabulary:].any(), key
                assert apart(whole[:vocabulary], wanted) < (2e-6 if exact else 0.03), key


def apart(ours, expected):
    """The largest difference, relative to the largest number."""
    return ((ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def test_chunks_are_few_and_small():
    """By hand: Llama 3's vocabulary on eight ranks and on one, and a small one."""
    assert loss.chunk_sizes(2048, 16032) == [2048]
    assert loss.chunk_sizes(8192, 128256) == [512] * 16
    assert loss.chunk_sizes(100, 512) == [100]
    assert loss.chunk_sizes(1, 10**9) == [1]
    assert loss.chunk_sizes(4000, 16032) == [2048, 1952]
    assert loss.chunk_sizes(1300, 40000) == [768, 532]
