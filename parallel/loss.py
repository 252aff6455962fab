"""Cross entropy over a vocabulary that is divided over the tensor parallel group."""

import torch

from parallel.collectives import all_reduce, all_reduce_max
from parallel.layers import local_index
from parallel.mesh import ALONE, Group


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, rank_index, group, ignore_index):
        counted = target != ignore_index
        local, inside = local_index(
            torch.where(counted, target, torch.zeros_like(target)), logits.shape[-1], rank_index
        )
        logits = logits - all_reduce_max(logits.amax(-1), group).unsqueeze(-1)
        exponentials = logits.exp()
        at_target = torch.gather(logits, -1, local.unsqueeze(-1)).squeeze(-1) * inside.float()
        # One collective for both sums: latency is what a small all-reduce costs.
        total, at_target = all_reduce(torch.stack([exponentials.sum(-1), at_target]), group).unbind(0)
        ctx.save_for_backward(exponentials / total.unsqueeze(-1), local, inside, counted)
        return (total.log() - at_target) * counted.float()

    @staticmethod
    def backward(ctx, grad):
        probabilities, local, inside, counted = ctx.saved_tensors
        columns = torch.arange(probabilities.shape[-1], device=local.device)
        hit = (local.unsqueeze(-1) == columns) & inside.unsqueeze(-1)
        return (probabilities - hit.float()) * (grad * counted.float()).unsqueeze(-1), None, None, None, None


def parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    rank_index: torch.Tensor,
    tensor_model_parallel_group: Group = ALONE,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The negative log-likelihood in nats of each target, fp32, shape of `target`; 0 where it is
    ignore_index.

    vocab_parallel_logits [..., vocabulary / size] are this rank's columns and are not changed; target [...]
    holds indices of the whole vocabulary; rank_index [1] is this rank's place in the group. The reduction of
    Megatron-LM's (https://arxiv.org/abs/1909.08053, section 3): maximum, sum of exponentials and target logit
    cross the group, not the logits.
    """
    return _ParallelCrossEntropy.apply(
        vocab_parallel_logits.float(), target, rank_index, tensor_model_parallel_group, ignore_index
    )
