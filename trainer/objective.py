"""The loss of a micro-batch, and what is counted of it for metrics.jsonl.

To train on something else, or to log another figure, change this file; docs/changing-the-loop.md shows how.
Training and evaluation, with one stage or several, call `loss_and_counts` here. The names of its figures are
in `FIGURES`.
"""

import torch

from model.llama import Llama
from parallel.pipeline import IGNORE_INDEX

# The figures of `loss_and_counts`, by their names in metrics.jsonl. Each is logged as a mean per target
# token.
FIGURES = ("loss",)


def loss_and_counts(
    model: Llama, hidden: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of a micro-batch on this rank, and count what is logged. Returns (loss_sum, counts).

    hidden [tokens, features] is what the last decoder layer returns. loss_sum, an fp32 scalar, is what is
    differentiated. It is a *sum* over target tokens: the update divides the gradients by the target tokens of
    all ranks and micro-batches. counts are fp32 [2 + len(FIGURES)]: target tokens, tokens that are no
    padding, and the sum of each figure.
    """
    # Both are [batch, sequence]; a loss is 0 where there is no target.
    losses, _log_sum_exp = model.token_losses(hidden, batch["labels"], batch.get("row_seeds"))
    target = batch["labels"] != IGNORE_INDEX  # [batch, sequence]
    target_tokens = target.float().sum()
    tokens = (batch["segment_ids"] > 0).float().sum()
    return losses.sum(), torch.stack([target_tokens, tokens, losses.detach().sum()])
