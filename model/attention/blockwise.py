"""Attention for rows that hold several examples, by blocks of queries."""

import torch
import torch.nn.functional as F

from parallel.collectives import keep_apart

BLOCKS = 256, 1024  # the fewest and the most queries that attend at once
KEYS = 128  # a block's keys begin at a multiple of this, which a systolic array takes at once


def block_size(sequence: int) -> int:
    """Queries that attend at once: half a row, within BLOCKS. A tensor of scores is [heads, block, keys].

    Smaller blocks skip more of the square above the diagonal: two leave 3/4 of it, four 5/8, eight 9/16. Each
    adds some 130 operations a layer to the graph.
    """
    fewest, most = BLOCKS
    return min(max(sequence // 2, fewest), most)


def first_key(first_query: int, window: int) -> int:
    """The first key of a block of queries that begins at `first_query`: with a window, the first multiple of
    KEYS that it does not hide from the whole block."""
    return max(0, first_query - window + 1) // KEYS * KEYS if window else 0


def segment_masks(
    segment_ids: torch.Tensor, block: int, window: int = 0, own_window: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """For each `block` of queries, what is added to scores: 0, or the least number where a key is not seen.

    fp32 [batch, 1, queries, 1, keys]; the keys are those from first_key up to the block's end. Position i
    sees j when both belong to one segment, j is not later than i, and i - j < `window`, if that is not 0.
    Where pipeline stages differ, `own_window` is this stage's as data, int32 [1], and `window` the largest,
    or 0. segment_ids [batch, sequence]; padding is segment 0 and sees itself only, so no row of the softmax
    is empty.
    """
    sequence, segment_ids = segment_ids.shape[1], segment_ids.to(torch.int32)
    order = torch.arange(sequence, dtype=torch.int32, device=segment_ids.device)
    least = torch.full((), torch.finfo(torch.float32).min, device=segment_ids.device)
    limit = own_window if own_window is not None else window if 0 < window < sequence else None
    masks = []
    for first in range(0, sequence, block):
        last = min(first + block, sequence)
        keys = slice(first_key(first, window), last)
        same = segment_ids[:, first:last].unsqueeze(2) == segment_ids[:, keys].unsqueeze(1)
        seen = same & (order[first:last].unsqueeze(1) >= order[keys].unsqueeze(0))
        if limit is not None:
            seen = seen & (order[first:last].unsqueeze(1) - order[keys].unsqueeze(0) < limit)
        masks.append(torch.where(seen, torch.zeros_like(least), least)[:, None, :, None])
    return masks


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """Dot-product attention with grouped queries, which are scaled already; softmax in fp32.

    query [sequence, batch, heads, head_dim]; key, value [sequence, batch, kv_heads, head_dim]; `masks` of
    segment_masks. Returns [sequence * batch, heads * head_dim]. Block by block of queries, with the keys up
    to its end: blocks above the diagonal, or that a window hides, are not computed, and no tensor holds the
    scores of all queries. The query heads that share a KV head form one product: nothing is repeated.
    """
    return _Attention.apply(query, key, value, *masks)


class _Attention(torch.autograd.Function):
    """Attention whose backward computes the scores again (FlashAttention-2,
    https://arxiv.org/abs/2307.08691, section 3.1): of the softmax only the logarithm of each query's sum is
    kept, and exp(score - it) is the probability.

    Products are by KV heads: the rows of a query are [batch * kv_heads, sequence * heads that share one,
    head_dim]. The backward has scores as [keys, queries]: gradients of keys and values are then products
    without a transposed operand, and no compiler takes the forward's scores for them, which it would have to
    keep.
    """

    @staticmethod
    def forward(ctx, query, key, value, *masks):
        tokens, kv_heads = query.shape, key.shape[2]
        query, key, value = (_by_heads(each, kv_heads) for each in (query, key, value))
        mixed, largest, total = [], [], []
        for queries, keys, mask in _blocks(query, masks):
            block = query[:, queries].clone()
            if mixed:
                keep_apart([block, mixed[-1]])  # one block after the other: memory holds the scores of one
            scores = torch.bmm(block, key[:, keys].transpose(1, 2)).float()
            scores = _add_mask(scores, mask, -2)
            largest.append(scores.amax(-1, keepdim=True))
            exponentials = (scores - largest[-1]).exp()
            total.append(exponentials.sum(-1, keepdim=True))
            mixed.append(torch.bmm(exponentials.to(value.dtype), value[:, keys]))
        mixed, largest, total = (torch.cat(each, 1) for each in (mixed, largest, total))
        mixed = _by_tokens((mixed.float() / total).to(value.dtype), tokens).flatten(0, 1).flatten(1)
        ctx.tokens = tokens
        ctx.save_for_backward(query, key, value, mixed, (largest + total.log()).transpose(1, 2), *masks)
        return mixed

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mixed, log_sums, *masks = ctx.saved_tensors
        kv_heads = len(key) // ctx.tokens[1]
        inner = (grad.float() * mixed.float()).view(ctx.tokens).sum(-1, keepdim=True)
        inner = _by_heads(inner, kv_heads).transpose(1, 2)  # [batch * kv_heads, 1, rows of the query]
        grad = _by_heads(grad.view(ctx.tokens), kv_heads)
        of_query, of_key, of_value = [], None, None
        for queries, keys, mask in _blocks(query, masks):
            block, outer = query[:, queries].clone(), grad[:, queries].clone()
            # The compiler computes no scores again before it has `grad` and has done with the block before.
            keep_apart([block, outer, *of_query[-1:]])
            scores = torch.bmm(key[:, keys], block.transpose(1, 2)).float()
            scores = _add_mask(scores, mask.permute(0, 1, 4, 2, 3), -1)
            probabilities = (scores - log_sums[:, :, queries]).exp()
            scores = torch.bmm(value[:, keys], outer.transpose(1, 2)).float() - inner[:, :, queries]
            scores = (probabilities * scores).to(value.dtype)
            of_value = _add(torch.bmm(probabilities.to(value.dtype), outer), of_value, keys)
            of_key = _add(torch.bmm(scores, block), of_key, keys)
            of_query.append(torch.bmm(scores.transpose(1, 2), key[:, keys]))
        of_three = torch.cat(of_query, 1), of_key, of_value
        return *(_by_tokens(each, ctx.tokens) for each in of_three), *(None for _ in masks)


def _by_heads(x, kv_heads):
    """[sequence, batch, heads, n] -> [batch * kv_heads, sequence * heads that share one, n]."""
    sequence, batch, _, n = x.shape
    return x.view(sequence, batch * kv_heads, -1, n).transpose(0, 1).reshape(batch * kv_heads, -1, n)


def _by_tokens(x, tokens):
    """The reverse of `_by_heads`; tokens: (sequence, batch, ...)."""
    sequence, batch = tokens[:2]
    apart = x.view(len(x), sequence, -1, x.shape[-1]).transpose(0, 1)
    return apart.reshape(sequence, batch, -1, x.shape[-1])


def _blocks(query, masks):
    """(which rows of the query, which keys, mask) of each block."""
    first, shared = 0, query.shape[1] // sum(mask.shape[2] for mask in masks)
    for mask in masks:
        last = first + mask.shape[2]
        yield slice(first * shared, last * shared), slice(last - mask.shape[4], last), mask
        first = last


def _add_mask(scores, mask, shared):
    """scores [batch * kv_heads, ...] + mask, of which dimension `shared` stands for the heads that share a KV
    head."""
    sizes = list(mask.shape[2:])
    sizes[shared] = -1
    kv_heads = len(scores) // len(mask)
    return (scores.view(len(mask), kv_heads, *sizes) + mask).view(scores.shape)


def _add(more, sums, keys):
    """`more` [..., keys, n] of a block, added to the sums of the blocks before, or None."""
    more = F.pad(more, (0, 0, keys.start, 0)) if keys.start else more
    return more if sums is None else F.pad(sums, (0, 0, 0, more.shape[1] - sums.shape[1])) + more
