"""Reading a checkpoint directory: its manifest, checks that it is whole, and any slice on any topology.

docs/checkpoint-format.md describes the directory; trainer/checkpoint/writer.py writes it.
"""

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash

from data.loader import Position
from model.lora import LoraConfig
from model.weights.hub import read_json
from model.weights.safetensors_file import TensorFile, as_bytes, bands, checksum, is_finite, read_part
from parallel.shard import Shard
from trainer.checkpoint.manifest_checks import check_manifest, check_pieces
from trainer.checkpoint.names import FORMAT, INCOMPLETE, KINDS, MANIFEST, VERSION, manifest_checksum

BAND_BYTES = 16 * 2**20  # the part of a tensor that `stream` holds in memory at once


class Checkpoint:
    """A complete checkpoint, opened for reading: manifest and headers at once, tensors on demand.

    `tensors` has each stored tensor by its key `<kind>/<name>`, `shapes` the global shape of each parameter
    by its name. Raises ValueError where `path` is no checkpoint, or one of its files is missing, truncated or
    unreadable. Damage within the tensors is found by `verify` and by `stream`.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.step: int = self.manifest["step"]
        self.position = Position(self.step, **self.manifest["position"])
        lora = self.manifest["identity"]["lora"]
        self.lora = LoraConfig(**lora | {"target_modules": tuple(lora["target_modules"])}) if lora else None
        self._files = _open_files(self.path, self.manifest["files"])
        self.tensors = {
            key: Stored(self.path, key, values, self._files)
            for key, values in self.manifest["tensors"].items()
        }
        check_pieces(self.manifest["tensors"], self._files)
        self.shapes = {
            key.removeprefix("parameter/"): stored.shape
            for key, stored in self.tensors.items()
            if key.startswith("parameter/")
        }

    def read(self, kind: str, name: str, shard: Shard | None = None) -> torch.Tensor:
        """The slice `shard` (default: all) of a parameter or a moment, fp32; `kind` is one of KINDS.

        Only the bytes of the slice are read. They are not verified.
        """
        stored = self.tensors[f"{kind}/{name}"]
        return stored.read(shard.slices if shard else tuple(slice(0, size) for size in stored.shape))

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter in consecutive bands of rows, fp32.

        Raises ValueError after the last band where the bytes are not those that were saved, or the values are
        not finite.
        """
        return self.tensors[f"parameter/{name}"].stream()

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        for file in self._files.values():
            file.close()

    def verify(self, kinds: tuple[str, ...] = KINDS) -> None:
        """Read all tensors of these kinds; raises ValueError that names the first one with a wrong checksum,
        or with values that are not finite."""
        stored = [each for key, each in self.tensors.items() if key.split("/")[0] in kinds]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for problem in pool.map(Stored.problem, stored):
                if problem:
                    raise ValueError(problem)

    def check(self, identity: dict) -> None:
        """Raise ValueError unless the checkpoint belongs to the run that `identity` describes."""
        for key, here in json.loads(json.dumps(identity)).items():
            there = self.manifest["identity"].get(key)
            if there != here:
                raise ValueError(
                    f"{self.path} is of another run: its {key} is {there}, and that of these flags is {here}"
                )

    def check_tensors(self, expected: dict[str, tuple[int, ...]], kinds: tuple[str, ...] = KINDS) -> None:
        """Raise ValueError unless the files hold exactly the `expected` parameters, in each of `kinds`.

        `expected` maps names to global shapes.
        """
        found = {key: stored.shape for key, stored in self.tensors.items() if key.split("/")[0] in kinds}
        wanted = {f"{kind}/{name}": shape for kind in kinds for name, shape in expected.items()}
        odd = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        if odd:
            raise ValueError(
                f"{self.path} is of another model: {odd[0]} has shape {found.get(odd[0], 'none')}, and "
                f"{wanted.get(odd[0], 'none')} was expected"
            )

    def restore(self, optimizer) -> None:
        """Give the optimizer's moments their stored values, in place.

        Its weights were already read, when the model was filled.
        """
        for kind, state in (("exp_avg", optimizer.exp_avg), ("exp_avg_sq", optimizer.exp_avg_sq)):
            values = {
                name: torch.zeros(shard.local_shape)
                if shard.padding
                else shard.pad(self.read(kind, name, shard))
                for name, shard in optimizer.buckets.shards.items()
            }
            state[:] = [
                value.to(old.device) for value, old in zip(optimizer.buckets.own(values), state, strict=True)
            ]


def _read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; raises ValueError where it is missing, damaged or of another version."""
    file = path / MANIFEST
    if not os.path.isfile(file) or path.name.endswith(INCOMPLETE):
        raise ValueError(
            f"{path} is no complete checkpoint: a directory checkpoint-<step> with a {MANIFEST} was expected"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ValueError(f"{file} is damaged: its checksum is not that of its contents")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or was changed: {error}") from None
    return manifest


def _open_files(path: Path, listed: dict[str, dict]) -> dict[str, TensorFile]:
    """The open files of the ranks, by name; raises ValueError where one of the `listed` files is damaged.

    Of the ranks' files only the headers are read; the other files are read and verified as a whole.
    """
    files = {}
    for name, values in listed.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is damaged")
        size = file.stat().st_size
        if size != values["bytes"]:
            raise ValueError(f"{file} has {size} bytes of {values['bytes']}: the checkpoint is damaged")
        if name.startswith("rank-"):
            files[name] = TensorFile(file)
            found = files[name].header_checksum
        else:
            found = checksum(file.read_bytes())
        if found != values["checksum"]:
            raise ValueError(f"{file} is damaged: its checksum is not that in {MANIFEST}")
    return files


@dataclass
class Piece:
    """Consecutive elements of a flattened slice, starting with number `first`: a 1-D tensor in `file`."""

    first: int
    file: TensorFile
    checksum: str


class Stored:
    """A tensor of a checkpoint: slices along one dimension, each of which is stored in pieces.

    Under ZeRO-1, a slice has a piece per data parallel rank. Raises ValueError where the files do not hold
    the whole tensor.
    """

    def __init__(self, path: Path, key: str, values: dict, files: dict[str, TensorFile]):
        self._key, self.shape = key, tuple(values["global_shape"])
        self._slices: list[tuple[Shard, list[Piece]]] = []
        held = 0
        for index, pieces in enumerate(values["slices"]):
            shard, end = Shard(self.shape, values["dim"], values["parts"], index), 0
            for each in pieces:
                entry = files[each["file"]].entries.get(key) if each["file"] in files else None
                if entry is None or each["first"] != end or entry.dtype != "F32" or len(entry.shape) != 1:
                    raise ValueError(f"{path}: of part {index} of {key}, the files hold only some elements")
                end += entry.numel
            if end != shard.numel:
                raise ValueError(
                    f"{path}: of part {index} of {key}, the files hold {end} of {shard.numel} elements"
                )
            held += end
            self._slices.append(
                (shard, [Piece(each["first"], files[each["file"]], each["checksum"]) for each in pieces])
            )
        if held != math.prod(self.shape):
            raise ValueError(f"{path}: of {key}, the parts hold {held} of {math.prod(self.shape)} elements")

    def read(
        self, part: tuple[slice, ...], digests: dict[int, xxhash.xxh3_128] | None = None
    ) -> torch.Tensor:
        """The requested part of the tensor, fp32.

        `digests`, a hash of each piece by its id(), are updated with the bytes that are read.
        """
        whole = torch.empty([each.stop - each.start for each in part])
        for shard, pieces in self._slices:
            overlap = [
                slice(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(part, shard.slices, strict=True)
            ]
            if all(each.start < each.stop for each in overlap):
                read_elements = partial(self._elements, pieces, digests)
                values = read_part(shard.shape, _within(shard.slices, overlap), read_elements)
                if values.shape == whole.shape:
                    return values  # one slice holds the part: no copy
                whole[_within(part, overlap)] = values
        return whole

    def _elements(self, pieces: list[Piece], digests, first: int, count: int) -> torch.Tensor:
        """`count` elements of a flattened slice, starting with number `first`."""
        found = []
        number = bisect_right([piece.first for piece in pieces], first) - 1
        while count:
            piece = pieces[number]
            length = min(count, piece.first + piece.file.entries[self._key].numel - first)
            found.append(piece.file.elements(self._key, first - piece.first, length))
            if digests is not None:
                digests.setdefault(id(piece), xxhash.xxh3_128()).update(as_bytes(found[-1]))
            first, count, number = first + length, count - length, number + 1
        return found[0] if len(found) == 1 else torch.cat(found)

    def stream(self) -> Iterator[torch.Tensor]:
        """The tensor in bands of rows; see Checkpoint.stream."""
        digests, finite = {}, True
        rest = tuple(slice(0, size) for size in self.shape[1:])
        for first, last in bands(self.shape, 4, BAND_BYTES):
            band = self.read((slice(first, last), *rest), digests)
            finite = finite and is_finite(band)
            yield band
        for _, pieces in self._slices:
            for piece in pieces:
                if digests[id(piece)].hexdigest() != piece.checksum:
                    raise ValueError(self._damaged(piece))
        if not finite:
            raise ValueError(self._not_finite(self._slices[0][1][0]))

    def problem(self) -> str | None:
        """What is wrong with this tensor; None where its bytes are as saved, and its values finite."""
        for _, pieces in self._slices:
            for piece in pieces:
                digest = xxhash.xxh3_128()
                finite = piece.file.update(self._key, digest)
                if digest.hexdigest() != piece.checksum:
                    return self._damaged(piece)
                if not finite:
                    return self._not_finite(piece)
        return None

    def _damaged(self, piece: Piece) -> str:
        return f"{piece.file.path} is damaged: the bytes of {self._key} are not those that were saved"

    def _not_finite(self, piece: Piece) -> str:
        return f"{piece.file.path.parent}: {self._key} has values that are not finite (NaN or infinite)"


def _within(outer: tuple[slice, ...], inner: list[slice]) -> tuple[slice, ...]:
    """The slices `inner`, relative to the start of `outer`."""
    return tuple(
        slice(each.start - own.start, each.stop - own.start) for each, own in zip(inner, outer, strict=True)
    )
