"""Which part of a parameter a rank holds: what loading, saving, merging, reduction and norms read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Shard:
    """Which part of a whole parameter a rank holds.

    The parameter of `global_shape` is cut into `parts` equal slices along `dim`, of which the rank holds
    number `index`; `replicas` neighbours in the tensor parallel group hold the same slice. Where `parts` do
    not divide it (a vocabulary, along dimension 0), the last slices are shorter or empty, and the rank's
    tensor, of `local_shape`, has rows of zeros behind its slice, which are neither read nor saved. A
    replicated parameter has dim None and parts 1. `partial` says that a replica's gradient is only its part
    of a sum over the replicas, not the whole. A `padding` parameter exists only so that all ranks have the
    same graph (parallel/pipeline.py): its gradient is 0, and it is neither read nor saved.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    parts: int = 1
    index: int = 0
    replicas: int = 1
    partial: bool = False
    padding: bool = False

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each dimension of the whole that the rank holds."""
        whole = [slice(0, size) for size in self.global_shape]
        if self.dim is not None:
            end, size = self.global_shape[self.dim], self.local_shape[self.dim]
            whole[self.dim] = slice(min(end, self.index * size), min(end, (self.index + 1) * size))
        return tuple(whole)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the rank's tensor: the same on all ranks."""
        return tuple(
            -(-size // self.parts) if dim == self.dim else size for dim, size in enumerate(self.global_shape)
        )

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """The rank's tensor: `values` of the slice, and zeros behind them where its rows are more."""
        missing = torch.Size(self.local_shape).numel() - values.numel()
        if not missing:
            return values
        return torch.cat([values.flatten(), values.new_zeros(missing)]).view(self.local_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return tuple(part.stop - part.start for part in self.slices)

    @property
    def numel(self) -> int:
        """The number of elements of the slice."""
        return torch.Size(self.shape).numel()


def divide(size: int, parts: int, what: str) -> int:
    """size / parts; raises ValueError naming `what` where that is no integer."""
    if size % parts:
        raise ValueError(
            f"{what} {size} is not divisible by {parts}, over which the tensor parallel ranks divide it"
        )
    return size // parts


def named_shards(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """(name, parameter, shard) of each parameter, a tied one once, in the module's order.

    Raises ValueError for a parameter that no parallel layer has added: how its gradient adds up over the
    ranks is not known.
    """
    seen = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{prefix}.{name}" if prefix else name
            if name not in getattr(owner, "shards", {}):
                raise ValueError(
                    f"the parameter {full_name} belongs to no parallel layer: derive "
                    f"{type(owner).__name__} from "
                    "parallel.layers.ParallelLayer and add it by add_parameter"
                )
            yield full_name, parameter, replace(owner.shards[name], padding=owner.is_padding)
