"""AdamW whose state exists before the first step, and the learning rate's course."""
import math

import torch
from torch import nn

from trainer.config import Config


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), the arithmetic of torch.optim.AdamW, in a graph that is the same every step.

    What changes from step to step (learning rate and bias corrections) is computed on the host in double precision and goes to
    the device as one tensor; moments and gradients are there from the start, so that the second step is no second graph.
    Matrices decay; norms and biases do not.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: Config):
        self.parameters, self.config = parameters, config
        self.exp_avg = {name: _zeros(parameter) for name, parameter in parameters.items()}
        self.exp_avg_sq = {name: _zeros(parameter) for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = _zeros(parameter)

    def scalars(self, step: int, learning_rate: float) -> torch.Tensor:
        """[learning rate, learning rate / (1 - beta1^t), sqrt(1 - beta2^t)] fp32 on the CPU, t = step + 1."""
        first = 1 - self.config.adam_beta1 ** (step + 1)
        second = 1 - self.config.adam_beta2 ** (step + 1)
        return torch.tensor([learning_rate, learning_rate / first, math.sqrt(second)], dtype=torch.float32)

    @torch.no_grad()
    def step(self, scalars: torch.Tensor) -> None:
        """Update every parameter from its gradient, then set the gradients to zero; `scalars` [3] on the device."""
        beta1, beta2, decay = self.config.adam_beta1, self.config.adam_beta2, self.config.weight_decay
        learning_rate, step_size, root = scalars[0:1], scalars[1:2], scalars[2:3]
        for name, parameter in self.parameters.items():
            first, second = self.exp_avg[name], self.exp_avg_sq[name]
            if decay and parameter.dim() > 1:
                parameter.mul_(1 - learning_rate * decay)
            first.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.sub_(step_size * first / (second.sqrt() / root + self.config.adam_epsilon))
            parameter.grad.zero_()


def _zeros(parameter: nn.Parameter) -> torch.Tensor:
    # Made on the CPU: zeros made on the device would be a graph of their own.
    return torch.zeros(parameter.shape, dtype=torch.float32).to(parameter.device)


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """The learning rate of the 0-based `step`: warmup from 0, then constant, or down to 0 linearly or as half a cosine.

    As Hugging Face's schedules of these names, except that `constant` has a warmup too.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {"constant": 1.0, "linear": max(0.0, 1 - progress), "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.lr_scheduler_type]
