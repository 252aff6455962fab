"""Cross entropy over a vocabulary that is divided over a group of ranks, by chunks of tokens.

The logits of all tokens in fp32 are among the largest tensors of a step: 8,192 tokens of Llama 3's vocabulary
are 4.2 GB. So the head's product, the softmax and their gradient are computed for some tokens after others.
"""

from collections.abc import Sequence

import torch

from parallel.collectives import all_reduce, all_reduce_max, keep_apart
from parallel.layers import local_index
from parallel.mesh import ALONE, Group
from parallel.pipeline import IGNORE_INDEX

CHUNK_BYTES = 128 * 2**20  # of a chunk's logits in fp32
MOST_CHUNKS = 16  # each adds some seventy operations to the graph
TILE = 128  # rows of a product that a NeuronCore computes at once


def chunk_sizes(tokens: int, columns: int) -> list[int]:
    """Into how many tokens at once logits [tokens, columns] are cut: all chunks of one size but the last."""
    count = min(-(-4 * tokens * columns // CHUNK_BYTES), MOST_CHUNKS)
    size = -(-tokens // (count * TILE)) * TILE
    return [min(size, tokens - first) for first in range(0, tokens, size)]


def linear_cross_entropy(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    target: torch.Tensor,
    rank_index: torch.Tensor,
    vocab_size: int,
    group: Group = ALONE,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of logits that are the sum of x W^T over the factors (x, W); both results have a
    gradient.

    x [tokens, features] is the same on all ranks, W [vocab_size / ranks, features] has this rank's columns of
    the logits. Where the ranks do not divide the vocabulary, the last ones have columns more, which count
    nothing. target [tokens] holds indices of the whole vocabulary; rank_index [1] is this rank's place in the
    group. Returns (the negative log-likelihood in nats of each target, 0 where it is IGNORE_INDEX; the
    logarithm of the sum of each token's exp(logits)), fp32 [tokens].

    Logits have the dtype of x, the softmax is fp32. The backward keeps the logits, or with `recompute` those
    of the last chunk, and computes the others again. The gradients of x are those of this rank's columns: the
    caller sums them over the group. The reduction is Megatron-LM's (https://arxiv.org/abs/1909.08053, section
    3): maximum, sum of exponentials and target logit cross the group, not the logits.
    """
    operands = [each for factor in factors for each in factor]
    return _LinearCrossEntropy.apply(target, rank_index, vocab_size, group, recompute, *operands)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, rank_index, vocab_size, group, recompute, *operands):
        inputs, weights = operands[::2], operands[1::2]
        columns = weights[0].shape[0]
        counted = target != IGNORE_INDEX
        local, inside = local_index(
            torch.where(counted, target, torch.zeros_like(target)), columns, rank_index
        )
        padding = None
        if columns * group.size() > vocab_size:
            padding = rank_index * columns + torch.arange(columns, device=target.device) >= vocab_size

        sizes, kept, statistics = chunk_sizes(len(target), columns), [], []
        transposed = [weight.t() for weight in weights]
        for place, *parts in _chunks(sizes, local.unsqueeze(-1), *inputs):
            kept.append(_product(parts, transposed))
            logits = _fp32(kept[-1], padding)
            largest = logits.amax(-1)
            total = (logits - largest.unsqueeze(-1)).exp().sum(-1)
            at_target = torch.gather(kept[-1], -1, place).squeeze(-1).float()
            statistics.append(torch.stack([largest, total, at_target]))
        # A chunk's sums are those of this rank's maximum. So all chunks cross the group in two messages:
        # latency is what a small one costs.
        own_largest, total, at_target = torch.cat(statistics, -1).unbind(0)
        largest = all_reduce_max(own_largest, group)
        sums = [total * (own_largest - largest).exp(), (at_target - largest) * inside.float()]
        total, at_target = all_reduce(torch.stack(sums), group).unbind(0)
        log_total = total.log()

        ctx.sizes, ctx.operands = sizes, len(operands)
        kept = kept[-1:] if recompute else kept
        hits = torch.where(inside & counted, local, torch.full_like(local, -1))
        ctx.save_for_backward(hits, counted, largest, log_total, padding, *operands, *kept)
        return (log_total - at_target) * counted.float(), log_total + largest

    @staticmethod
    def backward(ctx, grad_losses, grad_log_sum_exp):
        hits, counted, largest, log_total, padding, *saved = ctx.saved_tensors
        operands, kept = saved[: ctx.operands], saved[ctx.operands :]
        inputs, weights = operands[::2], operands[1::2]
        again = len(ctx.sizes) - len(kept)  # the first chunks, whose logits are computed again
        # The compiler begins here when the sums are there, and merges nothing with what the forward computed.
        inputs, kept, log_total = (
            [each.clone() for each in inputs],
            [each.clone() for each in kept],
            log_total.clone(),
        )
        keep_apart([*(inputs if again else ()), *kept, log_total])
        transposed = [weight.t() for weight in weights] if again else []
        of_target = grad_losses * counted.float()
        per_token = (hits, largest, log_total, of_target, of_target + grad_log_sum_exp)
        columns = torch.arange(kept[-1].shape[1], device=hits.device)

        gradients = _Gradients(weights, ctx.needs_input_grad[-ctx.operands :])
        chunks = _chunks(ctx.sizes, *(each.unsqueeze(-1) for each in per_token), *inputs)
        for number, (hit, largest, log_total, of_target, of_all, *parts) in enumerate(chunks):
            logits = _product(parts, transposed) if number < again else kept[number - again]
            # Two subtractions: the sum of the two is not exact enough where logits are large.
            probabilities = (_fp32(logits, padding) - largest - log_total).exp()
            grad = probabilities * of_all
            grad = torch.where(hit == columns, grad - of_target, grad)
            gradients.add(grad.to(logits.dtype), parts)
        return *(None for _ in range(5)), *gradients.whole()


class _Gradients:
    """The gradients of the factors, of which chunks of the logits' gradient are added one by one."""

    def __init__(self, weights, wants):
        self._weights, self._wants = weights, wants
        self._pieces, self._sums = [[] for _ in weights], [None for _ in weights]

    def add(self, grad, parts):
        """grad [tokens, columns]; parts: x [tokens, features] of each factor."""
        for n, (x, weight) in enumerate(zip(parts, self._weights, strict=True)):
            if self._wants[2 * n]:
                self._pieces[n].append(grad @ weight)
            if self._wants[2 * n + 1]:
                more, before = grad.t() @ x, self._sums[n]
                self._sums[n] = more if before is None else before + more.float()

    def whole(self):
        """The gradients of x and W of each factor, None where none is wanted."""
        for pieces, total, weight in zip(self._pieces, self._sums, self._weights, strict=True):
            yield torch.cat(pieces) if pieces else None
            yield None if total is None else total.to(weight.dtype)


def _chunks(sizes, *tensors):
    """The parts of all tensors that belong to a chunk, for each chunk of so many tokens."""
    return [tensors] if len(sizes) == 1 else zip(*(each.split(sizes) for each in tensors), strict=True)


def _product(parts, transposed):
    """The logits of a chunk: the sum of x W^T over the factors."""
    (x, *others), (weight, *factors) = parts, transposed
    logits = x @ weight
    for x, weight in zip(others, factors, strict=True):
        logits = torch.addmm(logits, x, weight)
    return logits


def _fp32(logits, padding):
    """The logits in fp32, those behind the end of the vocabulary the least number."""
    logits = logits.float()
    return logits if padding is None else logits.masked_fill(padding, torch.finfo(logits.dtype).min)
