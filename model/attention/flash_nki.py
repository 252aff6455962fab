"""neuronx-distributed's flash attention for NeuronCores, and the condition under which it can be used.

The kernel (neuronx_distributed/kernels/flash_attn.py) is causal and knows no segments. So a row must be one
example, followed by its padding: padding sees the example, and nothing that trains sees padding.

Importing this module needs no torch: tools.preflight reads the condition where torch may be missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROW_MULTIPLE = 2048  # the kernel takes rows of a multiple of this many positions
LARGEST_HEAD = 128  # elements


def why_not_flash(examples: int, sequence: int, head_dim: int, bf16: bool, window: int = 0) -> str:
    """Why the kernel cannot be used for rows of `sequence` positions; empty where it can.

    `examples`: the most examples that a row holds. `bf16`: whether attention computes in bfloat16. `window`:
    the shortest of the model's layers, 0 where none has one.
    """
    if examples > 1:
        return (
            f"a row holds up to {examples} examples, which must not see each other: "
            "--packing false gives each its own"
        )
    if sequence % ROW_MULTIPLE:
        return f"--max_seq_length {sequence} is no multiple of {ROW_MULTIPLE}"
    if 0 < window < sequence:
        return f"the kernel knows no window, and the model has one of {window} positions"
    if head_dim > LARGEST_HEAD:
        return f"the model's head_dim {head_dim} is above {LARGEST_HEAD}"
    if not bf16:
        return "the flash kernel computes in bfloat16, and --bf16 is off"
    return ""


def flash_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over whole rows, scaled by 1 / sqrt(head_dim).

    query [sequence, batch, heads, head_dim]; key, value [sequence, batch, kv_heads, head_dim]. Returns
    [sequence * batch, heads * head_dim]. Each KV head is repeated for the query heads that share it: the
    kernel is launched once a query head, and its backward refuses other shapes. Dropout is off. The kernel
    keeps no scores, so the backward recomputes nothing outside of it.
    """
    from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func

    sequence, batch, heads, head_dim = query.shape
    key, value = (
        each.unsqueeze(3).expand(-1, -1, -1, heads // each.shape[2], -1).flatten(2, 3)
        for each in (key, value)
    )
    # The kernel takes [batch, heads, head_dim, sequence] and returns [batch, heads, sequence, head_dim].
    mixed = nki_flash_attn_func(*(each.permute(1, 2, 3, 0) for each in (query, key, value)))
    return mixed.permute(2, 0, 1, 3).reshape(sequence * batch, heads * head_dim)
