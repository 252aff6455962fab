"""Blockwise attention against a dense one in float64, and what its graph holds."""

import math
import re

import pytest
import torch

from model.attention import blockwise
from tests.support.on_ranks import on_ranks

# (lengths of a row's examples and at last of its padding, for each row; heads; KV heads; head_dim; the most
# queries of a block)
CASES = {
    "one token": ([[1, 0]], 2, 1, 4, 8),
    "two rows of one token, several KV heads": ([[1, 0], [0, 1]], 4, 2, 6, 8),
    "examples of one token": ([[1] * 9 + [0]], 4, 2, 8, 4),
    "one block": ([[5, 12, 7], [24, 0]], 4, 2, 8, 24),
    "blocks divide the row": ([[5, 12, 7], [24, 0]], 4, 2, 8, 8),
    "they do not": ([[5, 12, 7], [24, 0]], 6, 2, 8, 7),
    "a last block of one query": ([[3, 9, 10], [0, 22]], 3, 3, 10, 7),
    "blocks of one query": ([[2, 3, 0]], 2, 2, 4, 1),
    "one KV head, an odd head_dim": ([[13, 4], [1, 16], [17, 0]], 5, 1, 7, 5),
    "padding alone": ([[0, 11]], 2, 1, 4, 4),
}


def inputs(rows, heads, kv_heads, head_dim, dtype=torch.float64, size=1.0):
    """query, key, value, the weight of the output, and segment ids."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor(
        [
            sum(([number] * length for number, length in enumerate(row[:-1], 1)), []) + [0] * row[-1]
            for row in rows
        ]
    )
    batch, sequence = segments.shape
    tensors = [
        torch.randn(sequence, batch, count, head_dim, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    tensors[0] *= size * head_dim**-0.5  # attention takes a scaled query
    return [each.to(dtype) for each in tensors], segments


def with_gradients(attention, three, weight):
    """[output, gradients of query, key and value] of a sum of the output with weights."""
    three = [each.detach().requires_grad_() for each in three]
    output = attention(*three)
    output.backward(weight.flatten(0, 1).flatten(1))
    return [output.detach(), *(each.grad for each in three)]


def dense(query, key, value, segments):
    """The whole square of scores, softmax by torch."""
    shared, sequence = query.shape[2] // key.shape[2], len(query)
    key, value = (each.repeat_interleave(shared, 2) for each in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key)
    seen = (segments.unsqueeze(2) == segments.unsqueeze(1)) & torch.ones(sequence, sequence).tril().bool()
    probabilities = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, value).flatten(0, 1).flatten(1)


def both(case, dtype, size=1.0):
    """(ours in `dtype`, dense in float64 of the same numbers, the largest score)."""
    rows, heads, kv_heads, head_dim, block = CASES[case]
    (*three, weight), segments = inputs(rows, heads, kv_heads, head_dim, dtype, size)
    masks = blockwise.segment_masks(segments, block)
    ours = with_gradients(lambda *three: blockwise.attend(*three, masks), three, weight)
    wide = [each.double() for each in three]
    expected = with_gradients(lambda *three: dense(*three, segments), wide, weight.double())
    key = wide[1].repeat_interleave(heads // kv_heads, 2)
    return ours, expected, torch.einsum("qbhd,kbhd->bhqk", wide[0], key).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_fp32_is_a_dense_attention(case):
    ours, expected, _ = both(case, torch.float32)
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_within_its_roundings(case):
    """Rounding to bf16 is off by at most 2^-9 of a number. A score s is rounded in the forward and in the
    backward, which shifts logarithms of probabilities by up to s * 2^-9 each time, also in the sum that they
    are divided by. Between inputs and a gradient at most six more are rounded, and what is subtracted in
    p * (dp - inner) is of the size of dp, so that each counts twice."""
    ours, expected, largest = both(case, torch.bfloat16)
    (*_, weight), _ = inputs(*CASES[case][:4])
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == torch.bfloat16
        size = max(wanted.norm().item(), weight.norm().item())  # also of a gradient that vanishes
        assert (found.double() - wanted).norm() <= (2 * 6 + 4 * largest) * 2**-9 * size


def test_large_scores_do_not_overflow():
    """Scores of hundreds, of which fp32's exponential would be infinite."""
    ours, expected, largest = both("they do not", torch.float32, size=200.0)
    assert largest > 500
    for found, wanted in zip(ours, expected, strict=True):
        assert (found.double() - wanted).norm() <= 4 * largest * 2**-24 * 200 * wanted.norm() + 1e-4


def test_the_forward_keeps_no_scores():
    """Beside the masks, which a step has once, nothing that is kept grows with the square of the row."""
    (*three, _), segments = inputs([[40, 20, 4]], 4, 2, 4, torch.float32)
    masks, kept = blockwise.segment_masks(segments, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        blockwise.attend(*(each.requires_grad_() for each in three), masks)
    kept = [each for each in kept if all(each is not mask for mask in masks)]
    assert sorted(each.numel() for each in kept) == sorted([64 * 16, 64 * 8, 64 * 8, 64 * 16, 64 * 4])


def largest_tensors(runtime, base, sequence):
    """{gradient checkpointing: (elements of the largest tensor, barriers) of forward and backward, traced and
    not executed}."""
    from pathlib import Path

    from model.config import ModelConfig
    from model.llama import Llama
    from model.weights.loading import fill
    from model.weights.sources import RandomWeights
    from parallel.graph.backend import hlo_text

    config, found = ModelConfig.from_pretrained(Path(base)), {}
    for checkpointing in ("none", "full"):
        model = Llama(config, gradient_checkpointing=checkpointing)
        fill(model, RandomWeights(config, 0), runtime.device, 0)
        ids = torch.zeros(1, sequence, dtype=torch.int64).to(runtime.device)
        model(ids, ids, ids).square().sum().backward()
        text = hlo_text([parameter.grad for parameter in model.parameters()])
        shapes = [
            [int(size) for size in shape.split(",")]
            for shape in re.findall(r"(?:f32|pred|bf16)\[([\d,]+)\]", text)
        ]
        found[checkpointing] = (max(map(math.prod, shapes)), text.count("opt-barrier("))
    return found


@pytest.mark.process
def test_no_tensor_holds_the_scores_of_all_queries(tmp_path):
    """At sequence 8192 with what a rank of Llama 3 8B at TP8 has: four heads on one KV head of 128."""
    from tests.support.models import save_llama

    save_llama(
        tmp_path,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=8192,
    )
    (found,) = on_ranks(largest_tensors, 1, base=str(tmp_path), sequence=8192)
    for checkpointing, (elements, _) in found.items():
        assert 0 < elements <= 4 * 8192 * 1024, checkpointing
    # A barrier stands before what is computed again: in each case before the backward of three norms and
    # SwiGLU, between the 8 blocks of attention and before each in the backward; and before a layer.
    assert {checkpointing: barriers for checkpointing, (_, barriers) in found.items()} == {
        "none": 4 + 7 + 8,
        "full": 4 + 7 + 8 + 7 + 1,
    }
