"""A tensor of a checkpoint: slices, each stored in pieces, read in any part and verified chunk by chunk."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial

import torch

from model.weights.safetensors_file import bands, is_finite, read_part
from parallel.shard import Shard
from trainer.checkpoint.pieces import Chunks, Piece, RankFiles, slice_pieces

BAND_BYTES = 16 * 2**20  # the part of a tensor that is in memory at once


class Stored:
    """A tensor of a checkpoint: slices along one dimension, each of which is stored in pieces.

    Under ZeRO-1, a slice has a piece per data parallel rank. Raises ValueError where the pieces do not make
    the whole tensor, and, when a file is opened, where it does not hold its piece.
    """

    def __init__(self, files: RankFiles, key: str, values: dict):
        """values: what the manifest says of the tensor, checked."""
        self._files, self._key, self.shape = files, key, tuple(values["global_shape"])
        self._whole = {name: values[name] for name in ("global_shape", "dim", "parts", "replicas")}
        self._shards = [
            Shard(self.shape, values["dim"], values["parts"], index) for index in range(values["parts"])
        ]
        try:
            self._layout = list(slice_pieces(key, values, self._shards))
        except ValueError as error:
            raise ValueError(f"{files.path}: {error}") from None
        self._pieces: dict[tuple[int, int], Piece] = {}
        held = sum(shard.numel for shard in self._shards)
        if held != math.prod(self.shape):
            raise ValueError(
                f"{files.path}: of {key}, the parts hold {held} of {math.prod(self.shape)} elements"
            )

    @property
    def piece_counts(self) -> list[int]:
        """The number of pieces of each slice."""
        return [len(ranks) for _, ranks in self._layout]

    def check(self) -> None:
        """Raise ValueError where a file does not hold its piece, as the manifest says. Opens all files."""
        for index, count in enumerate(self.piece_counts):
            for number in range(count):
                self._piece(index, number)

    def read(self, part: tuple[slice, ...], chunks: Chunks | None = None) -> torch.Tensor:
        """The requested part of the tensor, fp32. Only its bytes are read; `chunks` may verify them."""
        whole = torch.empty([each.stop - each.start for each in part])
        for index, shard in enumerate(self._shards):
            overlap = _overlap(part, shard.slices)
            if overlap is not None:
                read_elements = partial(self._elements, index, chunks)
                values = read_part(shard.shape, _within(shard.slices, overlap), read_elements)
                if values.shape == whole.shape:
                    return values  # one slice holds the part: no copy
                whole[_within(part, overlap)] = values
        return whole

    def read_verified(self, shard: Shard, first: int, count: int) -> torch.Tensor:
        """`count` elements of the flattened slice `shard`, beginning with number `first`, fp32.

        Of what is stored, whole chunks are read. Where a matrix is stored in other columns than the shard's,
        whole rows are read of each stored slice that has some of its columns. Raises ValueError where what is
        read is not as it was saved, or not finite.
        """
        for index, stored in enumerate(self._shards):
            if stored.slices == shard.slices:
                return self._verified(index, first, count)
        width = math.prod(shard.shape[1:])
        begin = shard.slices[0].start
        if shard.dim in (None, 0) and self._whole["dim"] in (None, 0):
            return self._flat(begin * width + first, count)
        last = -(-(first + count) // width)
        part = (slice(begin + first // width, begin + last), *shard.slices[1:])
        found = torch.empty([each.stop - each.start for each in part])
        for index, stored in enumerate(self._shards):
            overlap = _overlap(part, stored.slices)
            if overlap is not None:
                rows, columns = _within(stored.slices, overlap)
                lines, wide = rows.stop - rows.start, stored.shape[1]
                values = self._verified(index, rows.start * wide, lines * wide).view(lines, wide)
                found[_within(part, overlap)] = values[:, columns]
        return found.flatten()[first % width :][:count]

    def stream(self) -> Iterator[torch.Tensor]:
        """The tensor in bands of rows; see Checkpoint.stream."""
        chunks, finite = Chunks(), True
        rest = tuple(slice(0, size) for size in self.shape[1:])
        for first, last in bands(self.shape, 4, BAND_BYTES):
            band = self.read((slice(first, last), *rest), chunks)
            finite = finite and is_finite(band)
            yield band
        if not finite:
            raise ValueError(self._not_finite())

    def problem(self) -> str | None:
        """What is wrong with this tensor; None where its bytes are as saved, and its values finite."""
        try:
            for index, shard in enumerate(self._shards):
                for _ in self._blocks(index, 0, shard.numel):
                    pass
        except ValueError as error:
            return str(error)
        return None

    def _flat(self, first: int, count: int) -> torch.Tensor:
        """Elements of the flattened tensor, which is stored in slices of rows."""
        found, width = [], math.prod(self.shape[1:])
        for index, stored in enumerate(self._shards):
            begin = stored.slices[0].start * width
            start, stop = max(first, begin), min(first + count, begin + stored.numel)
            if start < stop:
                found.append(self._verified(index, start - begin, stop - start))
        return torch.cat(found)

    def _verified(self, index: int, first: int, count: int) -> torch.Tensor:
        """`count` elements of a stored slice, beginning with number `first`."""
        found = torch.empty(count)
        for at, values in self._blocks(index, first, count):
            start, stop = max(at, first), min(at + len(values), first + count)
            found[start - first : stop - first] = values[start - at : stop - at]
        return found

    def _blocks(self, index: int, first: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first, elements) of all chunks that have some of `count` elements of a stored slice.

        Raises ValueError where one is not as it was saved, or after a piece whose values are not finite.
        """
        firsts, chunks, end = self._layout[index][0], Chunks(), first + count
        while first < end:
            piece, finite = self._piece(index, bisect_right(firsts, first) - 1), True
            begin = (first - piece.first) // piece.chunk * piece.chunk
            stop = min(piece.length, -(-(end - piece.first) // piece.chunk) * piece.chunk)
            for at in range(begin, stop, BAND_BYTES // 4):
                values = piece.file.elements(self._key, at, min(BAND_BYTES // 4, stop - at))
                self._check(piece, chunks, at, values)
                finite = finite and is_finite(values)
                yield piece.first + at, values
            if not finite:
                raise ValueError(self._not_finite())
            first = piece.first + piece.length

    def _elements(self, index: int, chunks: Chunks | None, first: int, count: int) -> torch.Tensor:
        """`count` elements of a stored slice, beginning with number `first`; no other bytes are read."""
        found = []
        number = bisect_right(self._layout[index][0], first) - 1
        while count:
            piece = self._piece(index, number)
            length = min(count, piece.first + piece.length - first)
            found.append(piece.file.elements(self._key, first - piece.first, length))
            if chunks:
                self._check(piece, chunks, first - piece.first, found[-1])
            first, count, number = first + length, count - length, number + 1
        return found[0] if len(found) == 1 else torch.cat(found)

    def _check(self, piece: Piece, chunks: Chunks, first: int, values: torch.Tensor) -> None:
        if not chunks.agree(piece, first, values):
            raise ValueError(
                f"{piece.file.path} is damaged: the bytes of {self._key} are not those that were saved"
            )

    def _not_finite(self) -> str:
        return f"{self._files.path}: {self._key} has values that are not finite (NaN or infinite)"

    def _piece(self, index: int, number: int) -> Piece:
        """A piece of a slice, once the header of its file was compared with the manifest."""
        if (index, number) not in self._pieces:
            (firsts, ranks), numel = self._layout[index], self._shards[index].numel
            end = firsts[number + 1] if number + 1 < len(firsts) else numel
            piece = self._files.piece(
                ranks[number], self._key, self._whole | {"index": index, "first": firsts[number]}, end
            )
            self._pieces[index, number] = piece
        return self._pieces[index, number]


def _overlap(one: tuple[slice, ...], other: tuple[slice, ...]) -> list[slice] | None:
    """What two parts of a tensor have in common; None where that is nothing."""
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)]
    return common if all(each.start < each.stop for each in common) else None


def _within(outer: tuple[slice, ...], inner: list[slice]) -> tuple[slice, ...]:
    """The slices `inner`, relative to the start of `outer`."""
    return tuple(
        slice(each.start - own.start, each.stop - own.start) for each, own in zip(inner, outer, strict=True)
    )
