"""The pieces of a checkpoint's tensors: in which file each is, and whether its bytes are as they were saved.

A checkpoint of version 3 lists them in its manifest, each with one checksum. Since version 4 the manifest has
only the ranks that wrote them, and the checksums are in the headers of their files: a manifest stays small
however many ranks there are.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
import xxhash

from model.weights.safetensors_file import TensorFile, as_bytes
from parallel.shard import Shard
from trainer.checkpoint.manifest_checks import described_pieces
from trainer.checkpoint.names import CHUNK, MANIFEST, rank_file

RANK_FILE = re.compile(r"rank-(\d{5,9})\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a flattened slice, beginning with number `first`: a 1-D tensor in `file`.

    Each of `checksums` covers `chunk` elements, the last one those that are left.
    """

    first: int
    length: int
    file: TensorFile
    checksums: list[str]
    chunk: int


class Chunks:
    """Compares pieces with their checksums, chunk by chunk, as they are read.

    Each piece has to come from the beginning of a chunk on, in ascending order.
    """

    def __init__(self):
        self._begun: dict[tuple, xxhash.xxh3_128] = {}  # of the chunks that have come in part

    def agree(self, piece: Piece, first: int, values: torch.Tensor) -> bool:
        """Take in the elements of a piece from number `first` on; False where a chunk that ends among them is
        not as it was saved."""
        content, begin, end, good = as_bytes(values), first, first + len(values), True
        while first < end:
            number, name = first // piece.chunk, (piece.file, piece.first)
            last = min(piece.length, (number + 1) * piece.chunk)
            stop = min(last, end)
            digest = self._begun.pop(name, None) or xxhash.xxh3_128()
            digest.update(content[4 * (first - begin) : 4 * (stop - begin)])
            if stop == last:
                good = good and digest.hexdigest() == piece.checksums[number]
            else:
                self._begun[name] = digest
            first = stop
        return good


class RankFiles:
    """The files of the ranks. The header of one is read, and verified, when something of it is asked for."""

    def __init__(self, path: Path, manifest: dict):
        self.path, self._listed, self._opened = path, manifest["files"], {}
        self._opening: dict[int, Lock] = {}
        self._is_old = manifest["version"] == 3

    def open(self, rank: int) -> tuple[TensorFile, dict[str, dict]]:
        """(the file of a rank, what it says of the pieces that it holds, by their keys).

        Raises ValueError where it is missing or damaged, and OSError where it cannot be read.
        """
        with self._opening.setdefault(rank, Lock()):  # threads come together, and each file is read once
            if rank not in self._opened:
                self._opened[rank] = self._read_header(rank)
        return self._opened[rank]

    def _read_header(self, rank: int) -> tuple[TensorFile, dict[str, dict]]:
        path = self.path / rank_file(rank)
        listed = self._listed.get(path.name)
        if not listed:
            raise ValueError(f"{self.path}: a piece is in {path.name}, which {MANIFEST} does not list")
        check_size(path, listed["bytes"])
        file = TensorFile(path)
        check_found(path, file.header_checksum, listed)
        return file, described_pieces(file)

    def piece(self, rank: int, key: str, expected: dict, end: int) -> Piece:
        """The piece of the tensor `key` that a rank wrote, up to element `end` of its slice.

        expected: what its file must say of it. Raises ValueError where it does not, or does not hold it.
        """
        file, described = self.open(rank)
        entry, said = file.entries.get(key), dict(described.get(key, {}))
        first, length = expected["first"], end - expected["first"]
        if entry is None or entry.dtype != "F32" or entry.shape != (length,):
            raise ValueError(
                f"{self.path}: of part {expected['index']} of {key}, the files hold only some elements"
            )
        checksums, chunk = said.pop("checksums", None), CHUNK
        if self._is_old:  # one checksum of all
            checksums, chunk = [said.pop("checksum", None)], length
        good = isinstance(checksums, list) and len(checksums) == -(-length // chunk)
        if not good or said != expected:
            raise ValueError(
                f"{file.path} says something else of part {expected['index']} of {key} than the manifest"
            )
        return Piece(first, length, file, checksums, chunk)

    def close(self) -> None:
        """Close the files that are open."""
        for file, _ in self._opened.values():
            file.close()


def slice_pieces(
    key: str, values: dict, shards: list[Shard]
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(the numbers of the first elements of its pieces, the ranks that wrote them) of each slice of a tensor.

    values: what the manifest says of the tensor `key`. Raises ValueError where they do not make a slice.
    """
    for index, shard in enumerate(shards):
        if "slices" in values:
            firsts, ranks = _listed_pieces(values["slices"][index])
            good = firsts == sorted(set(firsts)) and firsts[:1] in ([], [0]) and None not in ranks
            held = shard.numel if firsts else 0
            if not good or firsts and firsts[-1] >= shard.numel:
                raise ValueError(f"of part {index} of {key}, the files hold only some elements")
        else:
            ranks = [rank for run in values["ranks"][index] for rank in range(*run)]
            most = len(ranks) * values["piece"]
            firsts = range(0, most, values["piece"])
            held = shard.numel if most - values["piece"] < shard.numel <= most else most
        if held != shard.numel:
            raise ValueError(f"of part {index} of {key}, the files hold {held} of {shard.numel} elements")
        yield firsts, ranks


def _listed_pieces(pieces: list[dict]) -> tuple[list[int], list[int | None]]:
    """(first elements, ranks) of the pieces of a slice as version 3 lists them."""
    numbers = [(name := RANK_FILE.fullmatch(piece["file"])) and int(name[1]) for piece in pieces]
    ranks = [
        number if number is not None and rank_file(number) == piece["file"] else None
        for number, piece in zip(numbers, pieces, strict=True)
    ]
    return [piece["first"] for piece in pieces], ranks


def check_size(path: Path, size: int) -> None:
    """Raise ValueError unless the file is there and has this size."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is damaged")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path} has {found} bytes of {size}: the checkpoint is damaged")


def check_found(path: Path, found: str, listed: dict) -> None:
    """Raise ValueError unless the checksum that was found is the one in the manifest."""
    if found != listed["checksum"]:
        raise ValueError(f"{path} is damaged: its checksum is not that in {MANIFEST}")
