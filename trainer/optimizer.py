"""AdamW whose state exists before the first step, and the learning rate's course."""

import math

import torch

from parallel.buckets import Buckets
from trainer.config import Config


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), the arithmetic of torch.optim.AdamW, in a graph that is the
    same every step.

    `weights`, `exp_avg` and `exp_avg_sq` are this rank's parts [1, columns] of each bucket
    (parallel/buckets.py): fp32 master weights, from which the parameters are rounded, and moments. Under
    --stochastic_rounding the weights are bf16: the hardware rounds the updated ones. What changes from step
    to step (learning rate and bias corrections) is computed on the host in double precision and goes to the
    device as one tensor. Matrices decay; norms and biases do not.
    """

    def __init__(self, buckets: Buckets, config: Config, state: list[list[torch.Tensor]]):
        """`state`: weights and both moments, of new_state or of a checkpoint (trainer/checkpoint/part.py)."""
        self.buckets, self.config = buckets, config
        self.weights, self.exp_avg, self.exp_avg_sq = state

    def scalars(self, step: int, learning_rate: float) -> torch.Tensor:
        """[learning rate, learning rate / (1 - beta1^t), sqrt(1 - beta2^t)] fp32 on the CPU, t = step + 1."""
        first = 1 - self.config.adam_beta1 ** (step + 1)
        second = 1 - self.config.adam_beta2 ** (step + 1)
        return torch.tensor([learning_rate, learning_rate / first, math.sqrt(second)], dtype=torch.float32)

    @torch.no_grad()
    def step(
        self, gradients: list[torch.Tensor], scalars: torch.Tensor, applies: torch.Tensor | None = None
    ) -> None:
        """Update the weights from the gradients, this rank's part of each bucket; `scalars` [3] on the
        device.

        Where `applies`, one bool on the device, is False, weights and moments stay as they are.
        """
        beta1, beta2, decay = self.config.adam_beta1, self.config.adam_beta2, self.config.weight_decay
        learning_rate, step_size, root = scalars[0:1], scalars[1:2], scalars[2:3]
        for bucket, weight, first, second, gradient in zip(
            self.buckets.buckets, self.weights, self.exp_avg, self.exp_avg_sq, gradients, strict=True
        ):
            state = (weight, first, second)
            before = [each.clone() for each in state]
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            update = step_size * first / (second.sqrt() / root + self.config.adam_epsilon)
            new = weight.float() * (1 - learning_rate * decay) if decay and bucket.decays else weight.float()
            weight.copy_(new - update)
            for new, old in zip(state, before, strict=True) if applies is not None else ():
                new.copy_(torch.where(applies, new, old))


def weights_dtype(config: Config) -> torch.dtype:
    """The dtype of the master weights."""
    return torch.bfloat16 if config.stochastic_rounding else torch.float32


def new_state(
    buckets: Buckets, config: Config, values: dict[str, torch.Tensor], device
) -> list[list[torch.Tensor]]:
    """The state before the first step; `values`: the fp32 values of the parameters on the CPU, by name, this
    rank's slices."""
    # Made on the CPU: zeros made on the device would be a graph of their own.
    own = buckets.own(values)
    weights = [value.to(weights_dtype(config)).to(device) for value in own]
    return [weights, *([torch.zeros_like(value).to(device) for value in own] for _ in range(2))]


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """The learning rate of the 0-based `step`: warmup from 0, then constant, or down to 0 linearly or as half
    a cosine.

    As Hugging Face's schedules of these names, except that `constant` has a warmup too.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": max(0.0, 1 - progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return config.learning_rate * factor[config.lr_scheduler_type]
