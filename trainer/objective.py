"""The objectives: the loss of a micro-batch, and what is counted of it for metrics.jsonl.

An objective is what the loop calls `state.objective` and knows nothing of: an object with `UNIT`, `FIGURES`
and `loss_and_counts`. Training and evaluation, with one stage or several, call it. To train on something
else, or to log another figure, change or add a class here: docs/changing-the-loop.md shows how.

loss_and_counts(model, hidden, batch) returns (loss_sum, counts). hidden [tokens, features] is what the last
decoder layer returns. loss_sum, an fp32 scalar, is what is differentiated. It is a *sum* over the units of
the objective (target tokens, pairs): the update divides the gradients by the units of all ranks and
micro-batches. counts are fp32 [2 + len(FIGURES)]: units, tokens that are no padding, and the sum of each
figure over the units. metrics.jsonl has the figures as means per unit, under the names in FIGURES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from parallel.pipeline import IGNORE_INDEX

if TYPE_CHECKING:
    from model.llama import Llama
    from trainer.config import Config

Batch = dict[str, torch.Tensor]


class Objective:
    """What the objectives share. `needs_reference`: whether batches must have the log-probabilities of the
    model before training (trainer/reference.py)."""

    UNIT: str
    FIGURES: tuple[str, ...]
    needs_reference = False

    def loss_and_counts(
        self, model: Llama, hidden: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the top of this file."""
        raise NotImplementedError

    def counts(self, model: Llama, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The counts alone, where nothing is differentiated."""
        return self.loss_and_counts(model, hidden, batch)[1]


@dataclass(frozen=True)
class SupervisedFineTuning(Objective):
    """The cross-entropy of the target tokens."""

    UNIT = "target_tokens"
    FIGURES = ("loss",)

    def loss_and_counts(
        self, model: Llama, hidden: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Both are [batch, sequence]; a loss is 0 where there is no target.
        losses, _log_sum_exp = model.token_losses(hidden, batch["labels"], batch.get("row_seeds"))
        target = batch["labels"] != IGNORE_INDEX  # [batch, sequence]
        target_tokens = target.float().sum()
        tokens = (batch["segment_ids"] > 0).float().sum()
        return losses.sum(), torch.stack([target_tokens, tokens, losses.detach().sum()])


@dataclass(frozen=True)
class DirectPreferenceOptimization(Objective):
    """DPO (https://arxiv.org/abs/2305.18290, equation 7), or IPO (https://arxiv.org/abs/2310.12036, equation
    17, with log-probabilities per token, as trl has it).

    Segments 2k + 1 and 2k + 2 of a row are the chosen and the rejected answer of a pair, each after the
    prompt. batch["segment_values"] [batch, segments] has the log-probability of each answer under the
    reference model. `label_smoothing` is that of conservative DPO. `rpo_alpha` times the chosen answer's loss
    per token is added (https://arxiv.org/abs/2404.19733, equation 1). The figures have trl's names.
    """

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None

    needs_reference = True
    UNIT = "pairs"
    FIGURES = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )

    def loss_and_counts(
        self, model: Llama, hidden: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reference = batch["segment_values"]
        logps, lengths = answer_logps(model, hidden, batch, reference.shape[1])
        exists = (lengths[:, 0::2] > 0).float()  # [batch, pairs]
        ratios = logps - reference
        losses = self.pair_losses(ratios, lengths)
        if self.rpo_alpha is not None:
            losses = losses - self.rpo_alpha * (logps / lengths.clamp(min=1))[:, 0::2]
        losses = losses * exists
        rewards, logps, detached = self.beta * ratios.detach(), logps.detach(), losses.detach()
        chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
        figures = (
            detached,
            chosen,
            rejected,
            (chosen > rejected).float(),
            chosen - rejected,
            logps[:, 0::2],
            logps[:, 1::2],
        )
        tokens = (batch["segment_ids"] > 0).float().sum()
        return losses.sum(), torch.stack(
            [exists.sum(), tokens, *((figure * exists).sum() for figure in figures)]
        )

    def pair_losses(self, ratios: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The loss of each pair [batch, pairs], from each answer's log-probability less the reference's, and
        its target tokens, both [batch, 2 x pairs]."""
        if self.loss == "ipo":
            per_token = ratios / lengths.clamp(min=1)
            return (per_token[:, 0::2] - per_token[:, 1::2] - 1 / (2 * self.beta)).square()
        margins = self.beta * (ratios[:, 0::2] - ratios[:, 1::2])
        losses = -F.logsigmoid(margins)
        if self.label_smoothing:
            # logsigmoid(-x) = logsigmoid(x) - x
            losses = losses + self.label_smoothing * margins
        return losses


def answer_logps(
    model: Llama, hidden: torch.Tensor, batch: Batch, segments: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of the target tokens, their number) of each segment, fp32 [batch, segments]; 0 where
    a row has no such segment.

    Sums are a product with one-hot segments: the shapes are the same for all rows, and nothing is scattered.
    """
    losses, _ = model.token_losses(hidden, batch["labels"], batch.get("row_seeds"))  # [batch, sequence]
    target = (batch["labels"] != IGNORE_INDEX).float()
    numbers = torch.arange(1, segments + 1, device=losses.device)
    one_hot = (batch["segment_ids"].unsqueeze(-1) == numbers).float()  # [batch, sequence, segments]
    logps, lengths = torch.bmm(torch.stack([-losses, target], 1), one_hot).unbind(1)
    return logps, lengths


def objective_of(config: Config) -> Objective:
    """The objective of --objective."""
    if config.objective == "sft":
        return SupervisedFineTuning()
    return DirectPreferenceOptimization(
        config.dpo_beta, config.dpo_loss, config.dpo_label_smoothing, config.rpo_alpha
    )
