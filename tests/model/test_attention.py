"""Blockwise attention against torch's in float64, and what its graph holds."""

import itertools
import math
import re

import pytest
import torch

from tests.support.on_ranks import on_ranks

pytestmark = pytest.mark.process

SEQUENCE, BATCH, HEADS, KV_HEADS, HEAD_DIM = 24, 2, 4, 2, 8
BLOCKS = (24, 8, 7)
SEGMENTS = torch.tensor([[1] * 5 + [2] * 12 + [0] * 7, [1] * 24])


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(SEQUENCE, BATCH, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def blockwise(runtime, blocks):
    """{recompute: output and gradients} in blocks of so many queries."""
    import model.attention.blockwise

    found = {block: {} for block in blocks}
    for block, recompute in itertools.product(blocks, (False, True)):
        model.attention.blockwise.BLOCKS = block, block
        *three, weight = (tensor.float().to(runtime.device) for tensor in inputs())
        for tensor in three:
            tensor.requires_grad_()
        output = model.attention.blockwise.attend(
            *three, model.attention.blockwise.segment_masks(SEGMENTS.to(runtime.device)), recompute
        )
        (output * weight.flatten(0, 1).flatten(1)).sum().backward()
        runtime.mark_step()
        found[block][recompute] = [output.detach().cpu(), *(tensor.grad.cpu() for tensor in three)]
    return found


@pytest.fixture(scope="module")
def in_blocks():
    [found] = on_ranks(blockwise, 1, blocks=BLOCKS)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_change_nothing(in_blocks, block):
    query, key, value, weight = inputs()
    for tensor in (query, key, value):
        tensor.requires_grad_()
    mask = (SEGMENTS.unsqueeze(2) == SEGMENTS.unsqueeze(1)) & torch.ones(
        SEQUENCE, SEQUENCE, dtype=torch.bool
    ).tril()
    repeated = [tensor.repeat_interleave(HEADS // KV_HEADS, 2).permute(1, 2, 0, 3) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3), *repeated, attn_mask=mask[:, None]
    )
    expected = expected.permute(2, 0, 1, 3).flatten(0, 1).flatten(1)
    (expected * weight.flatten(0, 1).flatten(1)).sum().backward()
    for tensors in in_blocks[block].values():
        for ours, theirs in zip(tensors, (expected.detach(), query.grad, key.grad, value.grad), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


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
    for checkpointing in ("none", "selective", "full"):
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
    # A barrier stands before what is computed again: each block of queries, or the layer; and, in each case,
    # before the backward of three norms and SwiGLU.
    assert {checkpointing: barriers for checkpointing, (_, barriers) in found.items()} == {
        "none": 4,
        "selective": 12,
        "full": 5,
    }
