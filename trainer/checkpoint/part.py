"""What a rank reads of a checkpoint when a run resumes: all ranks together read everything once.

Ranks that will have the same values in a bucket (replicas of a slice and, without ZeRO-1, all data parallel
ranks) read a share of it each, and the device gathers the rest: parallel/buckets.py says which share.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from parallel.buckets import Buckets, Range
from trainer.checkpoint.names import KINDS
from trainer.checkpoint.stored import Stored

READERS = 8  # threads of a process: a shared file system is slow to answer, not slow to send


@dataclass
class Part:
    """This rank's share [1, columns] of each bucket, fp32 on the CPU, in a list for each of KINDS.

    `ranges` are those that were read.
    """

    ranges: list[list[Range]]
    shares: list[list[torch.Tensor]]

    def is_of(self, buckets: Buckets) -> bool:
        """Whether these are the shares of this rank, whose place in the mesh may not have been known."""
        return self.ranges == buckets.shares()

    def gather(self, buckets: Buckets, dtype: torch.dtype, device) -> list[list[torch.Tensor]]:
        """The optimizer's weights, in `dtype`, and both moments, fp32: this rank's part of each bucket on the
        device. Nothing is executed: a mark_step has to follow."""
        return [
            buckets.gather_shares([value.to(of_kind).to(device) for value in each])
            for of_kind, each in zip((dtype, torch.float32, torch.float32), self.shares, strict=True)
        ]


def read_part(tensors: dict[str, Stored], buckets: Buckets) -> Part:
    """Read this rank's shares of the stored tensors, by `<kind>/<name>`.

    Raises ValueError where what is read is damaged, or not finite.
    """
    ranges = buckets.shares()
    shares = [[torch.zeros(1, buckets.share_columns(each)) for each in buckets.buckets] for _ in KINDS]

    def read(place):
        stored, each, values = place
        length = min(each.count, each.shard.numel - each.first)
        if length > 0 and not each.shard.padding:
            values[:length] = stored.read_verified(each.shard, each.first, length)

    def places():
        for kind, buckets_of_kind in zip(KINDS, shares, strict=True):
            for share, in_bucket in zip(buckets_of_kind, ranges, strict=True):
                begin = 0
                for each in in_bucket:
                    stored = None if each.shard.padding else tensors[f"{kind}/{each.name}"]
                    yield stored, each, share[0, begin : begin + each.count]
                    begin += each.count

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, places()):  # raises what a reader raised
            pass
    return Part(ranges, shares)
