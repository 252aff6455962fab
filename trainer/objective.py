"""What a step trains on: the loss of a micro-batch, and what is counted for metrics.jsonl.

To train on something else, or to log another figure, change this file. All topologies, pipeline stages and
accumulation steps use the two names below and nothing else of it.
"""

import torch

from model.llama import Llama
from parallel.pipeline import IGNORE_INDEX

# The figures of `loss_and_counts`, by their names in metrics.jsonl. Each is logged as a mean per target
# token.
FIGURES = ("loss",)


def loss_and_counts(
    model: Llama, logits: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum that is differentiated, counts) of a micro-batch on this rank.

    logits [batch, sequence, this rank's part of the vocabulary]. The first result is a *sum* over target
    tokens, fp32, a scalar: the update divides the gradients by the target tokens of all ranks and
    micro-batches. The counts are fp32 [2 + len(FIGURES)]: target tokens, tokens that are no padding, and the
    sum of each figure.
    """
    losses = model.token_losses(logits, batch["labels"])  # [batch, sequence], 0 where there is no target
    target_tokens = (batch["labels"] != IGNORE_INDEX).float().sum()
    tokens = (batch["segment_ids"] > 0).float().sum()
    return losses.sum(), torch.stack([target_tokens, tokens, losses.detach().sum()])
