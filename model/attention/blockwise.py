"""Attention for rows that hold several examples, by blocks of queries."""

import torch
import torch.nn.functional as F

from parallel.collectives import keep_apart

BLOCKS = (
    256,
    1024,
)  # the fewest and the most queries that attend at once: a tensor of scores is [heads, block, sequence]
KEYS = 128  # a block's keys begin at a multiple of this, which a systolic array takes at once


def block_size(sequence: int) -> int:
    """Queries that attend at once: half a row, within BLOCKS.

    Smaller ones skip more of the square above the diagonal (two blocks leave 3/4 of it, four 5/8), and each
    adds some fifty operations a layer to the graph.
    """
    fewest, most = BLOCKS
    return min(max(sequence // 2, fewest), most)


def first_key(first_query: int, window: int) -> int:
    """The first key of a block of queries that begins at `first_query`: with a window, the first multiple of
    KEYS that it does not hide from the whole block."""
    return max(0, first_query - window + 1) // KEYS * KEYS if window else 0


def segment_masks(
    segment_ids: torch.Tensor, window: int = 0, own_window: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """For each block of queries, bool [batch, queries, keys]; the keys are those from first_key up to the
    block's end.

    Position i sees j when both belong to one segment, j is not later than i, and i - j < `window`, if that is
    not 0. Where pipeline stages differ, `own_window` is this stage's as data, int32 [1], and `window` the
    largest, or 0. segment_ids [batch, sequence]; padding is segment 0 and sees itself only, so no row of the
    softmax is empty.
    """
    sequence = segment_ids.shape[1]
    order = torch.arange(sequence, device=segment_ids.device)
    limit = own_window if own_window is not None else window if 0 < window < sequence else None
    masks = []
    for first in range(0, sequence, block_size(sequence)):
        last = min(first + block_size(sequence), sequence)
        keys = slice(first_key(first, window), last)
        same = segment_ids[:, first:last].unsqueeze(2) == segment_ids[:, keys].unsqueeze(1)
        seen = same & (order[first:last].unsqueeze(1) >= order[keys].unsqueeze(0))
        if limit is not None:
            seen = seen & (order[first:last].unsqueeze(1) - order[keys].unsqueeze(0) < limit)
        masks.append(seen)
    return masks


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: list[torch.Tensor],
    gradient_checkpointing: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped queries; softmax in fp32.

    query [sequence, batch, heads, head_dim]; key, value [sequence, batch, kv_heads, head_dim]; `masks` of
    segment_masks. Returns [sequence * batch, heads * head_dim]. Block by block of queries, with the keys up
    to its end: blocks above the diagonal, or that a window hides, are not computed, and no tensor holds the
    scores of all queries.
    With `gradient_checkpointing` the backward computes scores again, and holds one block's at a time. The
    query heads that share a KV head form one product: nothing is repeated.
    """
    sequence, batch, heads, head_dim = query.shape
    # [batch * kv_heads, sequence, head_dim], of queries [batch * kv_heads, shared, sequence, head_dim]
    query = query.unflatten(2, (key.shape[2], -1)).permute(1, 2, 3, 0, 4).flatten(0, 1)
    key, value = (each.permute(1, 2, 0, 3).flatten(0, 1) for each in (key, value))
    mixed = _Attention.apply(query, key, value, gradient_checkpointing, *masks).view(
        batch, -1, *query.shape[1:]
    )
    return mixed.permute(3, 0, 1, 2, 4).reshape(sequence * batch, heads * head_dim)


class _Attention(torch.autograd.Function):
    """Attention of a query [batch * kv_heads, shared, sequence, head_dim], of which the output has the shape,
    to key and value [batch * kv_heads, sequence, head_dim], by blocks of queries.

    The softmax is divided by its sum behind the product with the values, where it is head_dim wide, and its
    backward sums there too, over output and gradient (FlashAttention-2, https://arxiv.org/abs/2307.08691,
    section 3.1): the scores, which are most of what attention reads and writes, are passed over as little as
    can be.
    """

    @staticmethod
    def forward(ctx, query, key, value, recompute, *masks):
        mixed, kept = [], []
        for part, keys, mask in _blocks(query, masks):
            exponentials, total = _exponentials(query[:, :, part], key[:, keys], mask)
            one = torch.bmm(exponentials, value[:, keys]).float() / total
            mixed.append(one.to(value.dtype).view(*query.shape[:2], -1, query.shape[-1]))
            kept += [total] if recompute else [total, exponentials]
        mixed = torch.cat(mixed, 2)
        ctx.recompute, ctx.blocks = recompute, len(masks)
        ctx.save_for_backward(query, key, value, mixed, *masks, *kept)
        return mixed

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mixed, *rest = ctx.saved_tensors
        masks, kept = rest[: ctx.blocks], rest[ctx.blocks :]
        wants = ctx.needs_input_grad[:3]
        scale, sums, of_query = query.shape[-1] ** -0.5, [None, None], []
        for part, keys, mask in _blocks(query, masks):
            total, block, outer = kept.pop(0), query[:, :, part], grad[:, :, part]
            if ctx.recompute:
                block, outer = block.contiguous(), outer.contiguous()
                keep_apart([block, outer])  # or the compiler would keep the forward's
                exponentials, _ = _exponentials(block, key[:, keys], mask)
            else:
                exponentials = kept.pop(0)
            block, outer = block.flatten(1, 2), outer.flatten(1, 2).float()
            inner = (outer * mixed[:, :, part].flatten(1, 2).float()).sum(-1, keepdim=True) / total
            outer = (outer / total).to(value.dtype)
            # Sums as [head_dim, keys]: of the same products as [keys, head_dim], XLA:CPU takes twice the
            # time.
            if wants[2]:
                sums[1] = _add(torch.bmm(outer.transpose(1, 2), exponentials), sums[1], keys)
            if wants[0] or wants[1]:
                scores = (torch.bmm(outer, value[:, keys].transpose(1, 2)).float() - inner) * (
                    exponentials.float() * scale
                )
                scores = scores.to(value.dtype)
            if wants[0]:
                of_query.append(torch.bmm(scores, key[:, keys]).view(*query.shape[:2], -1, query.shape[-1]))
            if wants[1]:
                sums[0] = _add(torch.bmm(block.transpose(1, 2), scores), sums[0], keys)
        of_key, of_value = (total if total is None else total.transpose(1, 2) for total in sums)
        return torch.cat(of_query, 2) if wants[0] else None, of_key, of_value, None, *(None for _ in masks)


def _blocks(query, masks):
    """(which queries, which keys, mask) of each block."""
    first = 0
    for mask in masks:
        queries, keys = mask.shape[1:]
        last = first + queries
        yield slice(first, last), slice(last - keys, last), mask
        first = last


def _add(more, sums, keys):
    """`more` [..., head_dim, keys] of a block, added to the sums of the blocks before, or None."""
    more = F.pad(more, (keys.start, 0)) if keys.start else more
    return more if sums is None else F.pad(sums, (0, more.shape[2] - sums.shape[2])) + more


def _exponentials(query, key, mask):
    """(exp(scores - their maximum) in key's dtype, [batch * kv_heads, shared * queries, keys]; its sum over
    the keys, fp32)."""
    scores = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).float() * query.shape[-1] ** -0.5
    apart = scores.view(
        mask.shape[0], -1, query.shape[1], *mask.shape[1:]
    )  # [batch, kv_heads, shared, queries, keys]
    apart = apart.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    exponentials = (apart - apart.amax(-1, keepdim=True)).exp().view(scores.shape)
    return exponentials.to(key.dtype), exponentials.sum(-1, keepdim=True)
