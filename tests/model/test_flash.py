"""The choice of the flash kernel, and its call with stand-ins that compute by torch in fp32: no NKI runs
without a NeuronCore."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model.attention.blockwise import attend, segment_masks
from model.attention.flash_nki import flash_attend, why_not_flash
from tests.support.nxd_on_threads import install, needs_source, stand_in
from tests.support.on_ranks import on_ranks


def causal(query, key, value, scale):
    """[batch, heads, sequence, head_dim] of [batch, heads, head_dim, sequence] each, in fp32."""
    assert query.shape == key.shape == value.shape
    scores = (query.float().transpose(2, 3) @ key.float()) * scale
    sequence = scores.shape[-1]
    later = torch.ones(sequence, sequence, dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(later, -1e30).softmax(-1) @ value.float().transpose(2, 3)).to(query.dtype)


def stand_in_for_nxd():
    """neuronx_distributed.kernels.flash_attn, without neuronx-distributed."""
    for name in ("neuronx_distributed", "neuronx_distributed.kernels"):
        sys.modules[name] = ModuleType(name)
    sys.modules["neuronx_distributed.kernels.flash_attn"] = SimpleNamespace(
        nki_flash_attn_func=lambda query, key, value: causal(query, key, value, query.shape[2] ** -0.5)
    )


@pytest.fixture
def kernel(monkeypatch):
    for name in (
        "neuronx_distributed",
        "neuronx_distributed.kernels",
        "neuronx_distributed.kernels.flash_attn",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # what was there comes back afterwards
    stand_in_for_nxd()


def inputs(sequence, heads=4, kv_heads=2, batch=2, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sequence, batch, count, head_dim, generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def outputs(function, *tensors):
    """function(query, key, value) and the gradients of its product with the weight."""
    *three, weight = (tensor.clone() for tensor in tensors)
    for tensor in three:
        tensor.requires_grad_()
    output = function(*three)
    (output * weight.flatten(0, 1).flatten(1)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in three)]


def dense(query, key, value):
    """torch's, in float64."""
    key, value = (each.repeat_interleave(query.shape[2] // key.shape[2], 2) for each in (key, value))
    three = (each.permute(1, 2, 0, 3).double() for each in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(*three, is_causal=True)
    return output.permute(2, 0, 1, 3).flatten(0, 1).flatten(1)


def test_the_call_is_causal_attention_with_shared_heads(kernel):
    for found, expected in zip(outputs(flash_attend, *inputs(24)), outputs(dense, *inputs(24)), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_what_trains_does_not_see_padding(kernel):
    """Of an example of 15 positions in a row of 24, output and gradients are those of the blockwise
    attention."""
    segments = torch.tensor([[1] * 15 + [0] * 9, [1] * 24])
    *three, weight = inputs(24)
    weight = weight * segments.t()[:, :, None, None]  # the loss reads the example's positions
    masks = segment_masks(segments, 16)
    expected = outputs(
        lambda query, key, value: attend(query * query.shape[-1] ** -0.5, key, value, masks), *three, weight
    )
    found = outputs(flash_attend, *three, weight)
    found[0], expected[0] = (each * segments.t().reshape(-1, 1) for each in (found[0], expected[0]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Launched:
    """An NKI kernel, launched on a grid."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(query, *tensors, use_causal_mask, dropout_p, softmax_scale, **rest):
            assert grid == query.shape[:2] and use_causal_mask and not dropout_p
            return self.function(query, *tensors, scale=softmax_scale, **rest)

        return launch


def forward(query, key, value, seed, scale, mixed_precision, config):
    assert config.should_transpose_v and mixed_precision and seed is None and query.shape[3] % 2048 == 0
    batch, heads, _, sequence = query.shape
    return causal(query, key, value, scale), torch.zeros(batch, heads, 128, sequence // 128)


def backward(query, key, value, output, gradient, lse, seed, scale, mixed_precision):
    assert output.shape == gradient.shape == query.shape and lse.shape[2] == 128
    with torch.enable_grad():
        three = [each.detach().requires_grad_() for each in (query, key, value)]
        torch.testing.assert_close(causal(*three, scale), output.transpose(2, 3))
        return torch.autograd.grad(causal(*three, scale), three, gradient.transpose(2, 3))


def real_call():
    """The outputs and gradients of the real nki_flash_attn_func on stand-ins for its two kernels."""
    install()
    package = sys.modules["neuronx_distributed"].__path__[0]
    stand_in("neuronx_distributed.kernels", f"{package}/kernels")
    stand_in("neuronxcc.nki.language")
    stand_in("neuronxcc.nki.kernels", flash_fwd=Launched(forward), flash_attn_bwd=Launched(backward))
    stand_in("neuronxcc.nki.kernels.attention", FlashConfig=SimpleNamespace)
    return outputs(flash_attend, *inputs(2048, batch=1))


def real_call_of(runtime):
    return real_call()


@needs_source
@pytest.mark.process
def test_the_real_function_is_called_as_its_kernels_ask():
    [found] = on_ranks(real_call_of, 1)
    for ours, theirs in zip(found, outputs(dense, *inputs(2048, batch=1)), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def losses_of(runtime, base):
    """{checkpointing: [losses and gradients] by blockwise attention, by the stand-in} of a padded row."""
    from pathlib import Path

    from model.config import ModelConfig
    from model.llama import Llama
    from model.weights.loading import fill
    from model.weights.sources import SafetensorsFiles

    stand_in_for_nxd()
    found = {}
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 11 + [0] * 5])
    labels = torch.where(segments == 1, ids.roll(-1), -100)
    batch = [each.to(runtime.device) for each in (ids, torch.arange(16)[None], segments)]
    for checkpointing in ("none", "full"):
        for flash in (False, True):
            model = Llama(
                ModelConfig.from_pretrained(Path(base)),
                gradient_checkpointing=checkpointing,
                flash_attention=flash,
            )
            fill(model, SafetensorsFiles(Path(base)), runtime.device, 0)
            losses, _ = model.token_losses(model.hidden_states(*batch), labels.to(runtime.device))
            losses.sum().backward()
            runtime.mark_step()
            found.setdefault(checkpointing, []).append(
                [losses.detach().cpu(), *(each.grad.cpu() for each in model.parameters())]
            )
    return found


@pytest.mark.process
def test_a_model_has_the_same_losses_and_gradients(tmp_path):
    from tests.support.models import save_llama

    save_llama(tmp_path, num_hidden_layers=1)
    [found] = on_ranks(losses_of, 1, base=str(tmp_path))
    for blockwise, flash in found.values():
        assert len(flash) == len(blockwise) > 10
        for ours, theirs in zip(flash, blockwise, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    "given, reason",
    [
        ((1, 2048, 128, True), ""),
        ((1, 8192, 64, True), ""),
        ((2, 2048, 128, True), "a row holds up to 2 examples"),
        ((1, 1024, 128, True), "no multiple of 2048"),
        ((1, 2048, 256, True), "head_dim 256 is above 128"),
        ((1, 2048, 128, False), "--bf16 is off"),
        ((1, 2048, 128, True, 4096), ""),
        ((1, 4096, 128, True, 2048), "knows no window, and the model has one of 2048 positions"),
    ],
)
def test_when_it_is_right(given, reason):
    said = why_not_flash(*given)
    assert bool(said) == bool(reason) and reason in said


def test_the_choice_is_said_and_follows_the_rows():
    from parallel import layers
    from tests.support.examples import rows_of
    from trainer.config import Config
    from trainer.job import attention_of

    config, head = Config(max_seq_length=2048, bf16=True), SimpleNamespace(head_dim=64, windows=())
    examples = [(list(range(5)), [True] * 5)] * 2
    alone, packed = rows_of(examples, [[0], [1]], 2048), rows_of(examples, [[0, 1]], 2048)
    nxd = ModuleType("nxd")
    assert attention_of(config, head, nxd, [alone]) == (
        True,
        "neuronx-distributed's layers, and its NKI flash attention: a row is one example",
    )
    windowed = SimpleNamespace(head_dim=64, windows=(0, 512))
    for rows, settings, model, said in (
        ([alone, packed], config, head, "--packing false"),
        ([alone], replace(config, bf16=False), head, "bfloat16"),
        ([alone], config, windowed, "one of 512 positions"),
    ):
        flash, text = attention_of(settings, model, nxd, rows)
        assert (
            not flash
            and text.startswith("neuronx-distributed's layers, and blockwise attention: ")
            and said in text
        )
    assert attention_of(config, head, layers, [alone]) == (
        False,
        "markstep's own layers and blockwise attention",
    )
