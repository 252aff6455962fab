"""Parameters of all shapes as a few long ones: what is reduced, updated and, under ZeRO-1, divided together.

ZeRO-1 (https://arxiv.org/abs/1910.02054): each of the `parts` data parallel ranks keeps master weights and
moments of one part of every parameter. A parameter's slice of n elements is a matrix [parts, ceil(n /
parts)], padded with zeros, whose row p is part p; without ZeRO-1 there is one part. A bucket is such matrices
side by side, cut where it would exceed BUCKET_BYTES, so one reduce-scatter along dimension 0 reduces and
divides it, and the optimizer sees one tensor in place of hundreds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.mesh import ALONE, Group, Mesh
from parallel.shard import Shard

BUCKET_BYTES = 128 * 10**6  # of fp32 gradients in one collective


@dataclass(frozen=True)
class Bucket:
    """`pieces` (name, first column, last column + 1) of parameters that agree in the rest.

    `decays`: weight decay applies (matrices). `replicas` and `partial` are those of the shards.
    """

    pieces: tuple[tuple[str, int, int], ...]
    decays: bool
    replicas: int
    partial: bool


@dataclass(frozen=True)
class Range:
    """`count` elements of the flattened slice `shard` of a parameter, beginning with number `first`.

    Of those beyond the slice, which are padding, there is nothing to read: they are 0.
    """

    name: str
    shard: Shard
    first: int
    count: int


class Buckets:
    """The buckets of the trained parameters. All lists of tensors that it takes and gives have one entry a
    bucket."""

    def __init__(
        self,
        trained: list[tuple[str, nn.Parameter, Shard]],
        mesh: Mesh,
        zero_1: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """`trained`: of parallel.layers.named_shards."""
        self.mesh = mesh
        self.parameters = {name: parameter for name, parameter, _ in trained}
        self.shards = {name: shard for name, _, shard in trained}
        self.parts, self.part = (mesh.dp.size(), mesh.dp.rank()) if zero_1 else (1, 0)
        self.divided = mesh.dp if zero_1 else ALONE  # over these ranks the parts are spread
        room = max(1, bucket_bytes // (4 * self.parts))  # columns
        grouped: dict[tuple, list[list]] = {}
        for name, shard in self.shards.items():
            buckets = grouped.setdefault((len(shard.global_shape) > 1, shard.replicas, shard.partial), [[]])
            start, columns = 0, self.columns(name)
            while start < columns:
                free = room - sum(stop - first for _, first, stop in buckets[-1])
                if not free:
                    buckets.append([])
                    continue
                stop = min(columns, start + free)
                buckets[-1].append((name, start, stop))
                start = stop
        self.buckets = [Bucket(tuple(pieces), *key) for key, buckets in grouped.items() for pieces in buckets]
        # Of the gradients, before they are reduced.
        self.shapes = [
            (self.parts, sum(stop - start for _, start, stop in bucket.pieces)) for bucket in self.buckets
        ]

    def columns(self, name: str) -> int:
        """Elements of a part of the parameter, padding included."""
        return -(-torch.Size(self.shards[name].local_shape).numel() // self.parts)

    def own(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part [1, columns], fp32, of values (name -> this rank's slice); on their device, which
        is the CPU."""
        return [bucket[self.part : self.part + 1] for bucket in self._flatten(values)]

    def own_piece(self, name: str, state: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """(the elements of a parameter in a state of [1, columns], without padding; the number of the first
        in the slice)."""
        pieces = []
        for bucket, tensor in zip(self.buckets, state, strict=True):
            offset = 0
            for other, start, stop in bucket.pieces:
                if other == name:
                    pieces.append(tensor[0, offset : offset + stop - start])
                offset += stop - start
        columns = self.columns(name)
        first = min(self.part * columns, self.shards[name].numel)
        length = min(columns, self.shards[name].numel - first)
        return torch.cat(pieces)[:length], first

    def holders(self, bucket: Bucket) -> tuple[Group, Group]:
        """The groups of ranks that have the same values in their part of a bucket: the replicas of a slice,
        and data parallel ranks unless they divide it."""
        return self.mesh.replicas(bucket.replicas), ALONE if self.parts > 1 else self.mesh.dp

    def share_columns(self, bucket: Bucket) -> int:
        """The columns of a share: the holders divide the bucket's among themselves, the last with padding."""
        replicas, copies = self.holders(bucket)
        return -(-sum(stop - start for _, start, stop in bucket.pieces) // (replicas.size() * copies.size()))

    def shares(self) -> list[list[Range]]:
        """What this rank's share of each bucket consists of, in its order."""
        return [list(self._share(bucket)) for bucket in self.buckets]

    def _share(self, bucket: Bucket) -> Iterator[Range]:
        (replicas, copies), columns = self.holders(bucket), self.share_columns(bucket)
        begin = (copies.rank() * replicas.size() + replicas.rank()) * columns
        offset = 0  # of the piece, in the bucket
        for name, start, stop in bucket.pieces:
            first, last = max(begin, offset), min(begin + columns, offset + stop - start)
            if first < last:
                element = self.part * self.columns(name) + start + first - offset
                yield Range(name, self.shards[name], element, last - first)
            offset += stop - start

    def gather_shares(self, shares: list[torch.Tensor]) -> list[torch.Tensor]:
        """The shares [1, share_columns] of all holders -> this rank's part [1, columns] of each bucket."""
        parts = []
        for bucket, (_, columns), share in zip(self.buckets, self.shapes, shares, strict=True):
            groups = [group for group in self.holders(bucket) if group.size() > 1]
            for group in groups:
                share = all_gather(share, group, 0).view(1, -1)
            # A view would be one in the graph of each step, too, which changes it in place.
            parts.append(share[:, :columns].clone() if groups else share)
        return parts

    def take_gradients(self, sums: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """The parameters' gradients, fp32 [parts, columns], or `sums` itself with them added in place; .grad
        is None afterwards."""
        found = self._flatten({name: parameter.grad for name, parameter in self.parameters.items()})
        for parameter in self.parameters.values():
            parameter.grad = None
        if sums is None:
            return found
        for total, one in zip(sums, found, strict=True):
            total.add_(one)
        return sums

    def reduce(self, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """[parts, columns] of each rank -> this rank's part [1, columns] of the sum over all ranks.

        Over the data parallel ranks, and partial gradients over the replicas of their slice.
        """
        reduced = []
        for bucket, total in zip(self.buckets, sums, strict=True):
            total = (
                reduce_scatter(total, self.divided, 0) if self.parts > 1 else all_reduce(total, self.mesh.dp)
            )
            reduced.append(
                all_reduce(total, self.mesh.replicas(bucket.replicas)) if bucket.partial else total
            )
        return reduced

    @torch.no_grad()
    def set_parameters(self, weights: list[torch.Tensor], applies: torch.Tensor | None = None) -> None:
        """Give the parameters the values of the master weights [1, columns], rounded to their dtype, from all
        parts.

        Where `applies`, one bool on the device, is False, the weights have not changed, and parameters stay.
        They would not by themselves: to keep collectives in their order, torch_xla adds 0 x the result of the
        one before to what is gathered, and 0 x NaN is NaN.
        """
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in self.parameters}
        for bucket, weight in zip(self.buckets, weights, strict=True):
            dtype = self.parameters[bucket.pieces[0][0]].dtype
            whole = all_gather(weight.to(dtype), self.divided, 0)
            offset = 0
            for name, start, stop in bucket.pieces:  # torch_xla's split cuts every piece once for each piece
                columns[name].append(_columns(whole, offset, offset + stop - start))
                offset += stop - start
        for name, parameter in self.parameters.items():
            matrix = columns[name][0] if len(columns[name]) == 1 else torch.cat(columns[name], 1)
            value = _columns(matrix.view(1, -1), 0, parameter.numel()).view(parameter.shape)
            gathered = self.parts > 1 and applies is not None
            parameter.copy_(torch.where(applies, value, parameter) if gathered else value)

    def _flatten(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """fp32 [parts, columns] of each bucket."""
        matrices = {}
        for name, value in values.items():
            flat, padding = value.float().flatten(), self.columns(name) * self.parts - value.numel()
            matrices[name] = (F.pad(flat, (0, padding)) if padding else flat).view(self.parts, -1)
        return [
            torch.cat([_columns(matrices[name], start, stop) for name, start, stop in bucket.pieces], 1)
            for bucket in self.buckets
        ]


def _columns(matrix, start, stop):
    """matrix[:, start:stop]; of all columns the matrix itself, because torch_xla records a copy."""
    return matrix if stop - start == matrix.shape[1] else matrix[:, start:stop]
