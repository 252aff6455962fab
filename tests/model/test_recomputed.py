"""The norm, SwiGLU and dropout before a product, against float64; and what a decoder layer keeps."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from model.lora import LoraConfig, hash_token_seeds, keep_mask
from tests.support.on_ranks import on_ranks
from tools.graphs.models import LLAMA2_7B

pytestmark = pytest.mark.process

SIZES = ((1, 1), (1, 7), (5, 3), (12, 16))  # tokens, features
OUTPUTS, EPS, DROPOUT = 4, 1e-5, 0.25
SEQUENCE, BATCH, HIDDEN, MIDDLE = 7, 2, 48, 80  # of the decoder layer; its heads have 4 x 8
TOKENS = SEQUENCE * BATCH
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = LLAMA2_7B | {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def values(tokens, features):
    """In float64: two activations, a norm's weight, two weights and a bias of products, the output's
    gradient."""
    generator = torch.Generator().manual_seed(tokens * features)
    sizes = (tokens, features), (tokens, features), (features,), (OUTPUTS, features), (OUTPUTS, features)
    return [
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in (*sizes, (OUTPUTS,), (tokens, OUTPUTS))
    ]


def seeds(tokens, features):
    return hash_token_seeds(torch.tensor([7]), tokens).flatten(), torch.arange(
        features, dtype=torch.int32
    ) * 997


def chains(norm, swiglu, linear, dropped_linear):
    """Outputs [tokens, OUTPUTS] of products whose inputs are computed in different ways from `values`."""

    def products(x, *weights):  # they share their input, the last one a part of it
        return sum(y.square() for y in linear(x, *weights)) * dropped_linear(x, weights[0])

    return {
        "plain": lambda x, y, scale, a, b, bias: products(x * scale + y, a, b) + bias,
        "norm": lambda x, y, scale, a, b, bias: products(norm(x + y, scale), a, b) + bias,
        "swiglu": lambda x, y, scale, a, b, bias: products(swiglu(x * scale, y), a, b) + bias,
    }


def results(chain, inputs):
    *inputs, grad = inputs
    inputs = [each.requires_grad_() for each in inputs]
    output = chain(*inputs)
    (output * grad).sum().backward()
    return [output.detach(), *(each.grad for each in inputs)]


def ours(runtime):
    """{(tokens, features): {chain: [output, *gradients]}}, fp32 on the device."""
    from model.lora import _DroppedLinear
    from model.norm import _RMSNorm
    from model.swiglu import swiglu
    from parallel.linear import linear

    found = {}
    for size in SIZES:
        tokens, features = (each.to(runtime.device) for each in seeds(*size))

        def keep(tokens, features=features):
            return keep_mask(tokens, features, DROPOUT)

        functions = chains(
            lambda x, weight: _RMSNorm.apply(x, weight, EPS),
            swiglu,
            linear,
            lambda *operands, more=(tokens, keep, 1 - DROPOUT): _DroppedLinear.apply(*operands, *more),
        )
        inputs = [each.float() for each in values(*size)]
        here = {
            name: results(chain, [each.to(runtime.device) for each in inputs])
            for name, chain in functions.items()
        }
        runtime.mark_step()
        found[size] = {
            name: [each if each is None else each.cpu() for each in tensors] for name, tensors in here.items()
        }
    return found


def test_gradients_are_those_of_float64():
    [found] = on_ranks(ours, 1)
    for size, chains_of_size in found.items():
        keep = keep_mask(*seeds(*size), DROPOUT).double() / (1 - DROPOUT)
        reference = chains(
            lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            lambda gate, up: F.silu(gate) * up,
            lambda x, *weights: [F.linear(x, weight) for weight in weights],
            lambda x, weight, keep=keep: F.linear(x * keep, weight),
        )
        for name, tensors in chains_of_size.items():
            for one, other in zip(tensors, results(reference[name], values(*size)), strict=True):
                if other is None:
                    assert one is None
                else:
                    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def kept_by_a_layer(runtime, model_config):
    """{training: how many tensors of each shape, weights aside, autograd keeps of a decoder layer}."""
    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import add_lora
    from parallel.graph.backend import tensor_id

    config, found = ModelConfig.from_settings(model_config), {}
    for training, dropout in (("all weights", None), ("LoRA", 0.0), ("LoRA with dropout", DROPOUT)):
        model = Llama(config, device="cpu")
        if dropout is not None:
            add_lora(model, LoraConfig(4, 8.0, dropout, LINEAR))
        model.to(runtime.device)
        positions = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64).to(runtime.device)
        inputs = model.layer_inputs(positions, positions, positions[:, 0])
        x = torch.zeros(TOKENS, HIDDEN).to(runtime.device).requires_grad_()
        kept = {}

        def keep(tensor, kept=kept):
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor_id(tensor)] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model.stage(x * 1, inputs)
        found[training] = Counter(kept.values())
        y.sum().backward()
        runtime.mark_step()
    return found


def test_a_layer_keeps_what_nothing_else_gives():
    """The residual twice, and gate and up. No normed one, no silu(gate) * up, no mask, no transposed copy."""
    [found] = on_ranks(kept_by_a_layer, 1, model_config=MODEL)
    for training, kept in found.items():
        assert kept[TOKENS, HIDDEN] == 2, training
        assert kept[TOKENS, MIDDLE] == 2, training
        assert not kept[HIDDEN, TOKENS] and not kept[MIDDLE, TOKENS], training
