"""Tensors that the backward computes again from others that are kept anyway.

A product needs its input in the backward where its weight trains. Where a norm or SwiGLU made that input,
what it was made of is kept for their own backward: the product keeps that, and no tensor more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from parallel.collectives import keep_apart

Kept = Sequence[torch.Tensor]


class Recomputed:
    """How the backward computes a tensor again: function(*sources), from the sources that autograd saved.

    All that need the tensor in one backward share it: the first computes it. The backward of the function
    that made it comes last, and must call `forget`: no tensor is held here from one backward to the next.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.forget()

    def forget(self) -> None:
        """Let go of the tensors of this backward."""
        self._sources = self._tensor = None

    def sources(self, saved: Kept, grad: torch.Tensor) -> Kept:
        """The `saved` sources as the backward of `grad` has to read them.

        The compiler computes nothing of these before it has `grad`, and does not replace what is computed of
        them by what the forward computed, which it would have to keep for that.
        """
        if self._sources is None:
            # Barriers change what they get in place, so they get copies, which cost no operation. Weights
            # need none.
            self._sources = [each if isinstance(each, nn.Parameter) else each.clone() for each in saved]
            keep_apart(
                [grad.clone(), *(each for each in self._sources if not isinstance(each, nn.Parameter))]
            )
        return self._sources

    def tensor(self, saved: Kept, grad: torch.Tensor) -> torch.Tensor:
        """The tensor, from the `saved` sources, for the backward of `grad`."""
        if self._tensor is None:
            self._tensor = self.function(*self.sources(saved, grad))
        return self._tensor


def recompute(
    tensor: torch.Tensor, function: Callable[..., torch.Tensor], *sources: torch.Tensor
) -> Recomputed:
    """Let the backward compute `tensor`, which is function(*sources), again; returns how.

    To be called in the forward of the autograd function that makes the tensor, which saves the sources, too.
    """
    tensor.recomputed = Recomputed(function), sources
    return tensor.recomputed[0]


def kept_for(tensor: torch.Tensor) -> tuple[Recomputed | None, Kept]:
    """(how the backward computes `tensor` again, what to save for it); (None, the tensor) where it is
    saved."""
    return getattr(tensor, "recomputed", (None, (tensor,)))


def restore(how: Recomputed | None, saved: Kept, grad: torch.Tensor) -> torch.Tensor:
    """The tensor, of what `kept_for` gave, in the backward of `grad`."""
    return how.tensor(saved, grad) if how else saved[0]
