"""The global norm of the reduced gradients, and clipping."""

import torch

from parallel.buckets import Buckets
from parallel.collectives import all_reduce


def global_norm(buckets: Buckets, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of the gradient of the whole model, fp32, shape [1], from this rank's part of each bucket.

    Each slice counts once: the squares of one that `replicas` ranks hold are divided by that number before
    the sum.
    """
    squares = torch.stack(
        [
            (gradient * gradient).sum() / bucket.replicas
            for bucket, gradient in zip(buckets.buckets, gradients, strict=True)
        ]
    )
    mesh = buckets.mesh
    return all_reduce(squares.sum().reshape(1), mesh.world if buckets.parts > 1 else mesh.model).sqrt()


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> list[torch.Tensor]:
    """The gradients times min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ scales them."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]
