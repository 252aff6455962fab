"""neuronx-distributed's flash attention for NeuronCores (neuronx_distributed/kernels/flash_attn.py), and when
it is right.

The kernel is causal and knows no segments, so a row must be one example and its padding, which comes after
it: padding sees the example, and nothing that trains sees padding.
"""

import torch

MULTIPLE, LARGEST_HEAD = 2048, 128  # positions of a row; elements of a head


def why_not_flash(examples: int, sequence: int, head_dim: int, dtype: torch.dtype) -> str:
    """Why the kernel cannot be used for rows of `sequence` positions that hold up to so many examples; empty
    where it can."""
    if examples > 1:
        return f"a row holds up to {examples} examples, which must not see each other: --packing false gives each its own"
    if sequence % MULTIPLE:
        return f"--max_seq_length {sequence} is no multiple of {MULTIPLE}"
    if head_dim > LARGEST_HEAD:
        return f"the model's head_dim {head_dim} is above {LARGEST_HEAD}"
    if dtype != torch.bfloat16:
        return "the flash kernel computes in bfloat16, and --bf16 is off"
    return ""


def flash_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over whole rows, scaled by 1 / sqrt(head_dim).

    query [sequence, batch, heads, head_dim]; key, value [sequence, batch, kv_heads, head_dim]. Returns
    [sequence * batch, heads * head_dim]. Each KV head is repeated for the query heads that share it: the
    kernel is launched once a query head, and its backward refuses other shapes. Dropout is off and no scores
    are kept, so there is nothing to compute again but the kernel.
    """
    from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func

    sequence, batch, heads, head_dim = query.shape
    key, value = (
        each.unsqueeze(3).expand(-1, -1, -1, heads // each.shape[2], -1).flatten(2, 3)
        for each in (key, value)
    )
    # [batch, heads, head_dim, sequence] of each -> [batch, heads, sequence, head_dim]
    mixed = nki_flash_attn_func(*(each.permute(1, 2, 3, 0) for each in (query, key, value)))
    return mixed.permute(2, 0, 1, 3).reshape(sequence * batch, heads * head_dim)
