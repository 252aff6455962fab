"""Safetensors files that are read by ranges of elements and written in any order.

The library maps whole files and writes whole dictionaries. With these classes a rank reads only its slices,
and a merge holds only a few bands of rows in memory, whatever the size of the model.

The format (https://github.com/huggingface/safetensors#format) is: 8 bytes, the length n of the header, little
endian; n bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}; the
bytes of the tensors, row-major, without gaps.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from model.weights.descriptors import Descriptors
from model.weights.hub import in_one_line, naming

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 10**8  # the library's limit
# What Python and torch raise for values that no header has.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError)
CHUNK_BYTES = 16 * 2**20  # the bytes of a tensor that `chunks` reads at once
OPEN_FILES = Descriptors()  # of the process: its limit is one of the process, too


@dataclass(frozen=True)
class Entry:
    """A tensor in the header: its dtype, by the format's name, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class TensorFile:
    """A safetensors file to read from: its `entries` by name, its `metadata` and `header_checksum`.

    Raises ValueError where the library refuses the header, where it names a tensor twice or does not agree
    with the file's length, and OSError where the file cannot be opened. Threads may share it. Of all files of
    the process only a few are open at once (model/weights/descriptors.py).
    """

    def __init__(self, path: Path):
        self.path, self.entries, self.metadata = Path(path), {}, {}
        self._key = object()
        with self._reading() as descriptor:
            size, *_ = self._identity = _identity(descriptor)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"{path} is damaged: {size} bytes that do not begin with the header of a safetensors file"
                )
            header = os.pread(descriptor, length, 8)
        self.header_checksum = checksum(header)
        try:
            described = json.loads(header, object_pairs_hook=_once)
            self.metadata = dict(described.pop("__metadata__", None) or {})
            end = 8 + length
            for name, values in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
                entry = Entry(values["dtype"], tuple(values["shape"]), end)
                first, last = values["data_offsets"]
                if entry.dtype in DTYPES and last - first != entry.numel * DTYPES[entry.dtype].itemsize:
                    raise ValueError(f"{name} has {last - first} bytes, which is not its shape")
                if first != end - 8 - length or last < first:
                    raise ValueError(f"{name} does not begin where the tensor before it ends")
                self.entries[name], end = entry, 8 + length + last
        except UNREADABLE as error:
            raise ValueError(f"{path} is damaged: its header: {in_one_line(error)}") from None
        if end != size:
            raise ValueError(f"{path} is damaged: it has {size} bytes, and by its header {end}")
        try:
            with safe_open(path, "pt"):
                pass  # the library checks the rest: types of all values, dtypes, UTF-8
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {in_one_line(error)}") from None

    def _reading(self):
        return OPEN_FILES.reading(self._key, self.path)

    def close(self) -> None:
        """Close the file until it is read again; any thread may, more than once."""
        OPEN_FILES.close(self._key)

    def __del__(self):
        if hasattr(self, "_key"):
            OPEN_FILES.close_later(self._key)

    def elements(self, name: str, first: int, count: int) -> torch.Tensor:
        """[count] elements of the flattened tensor, starting with number `first`, in the file's dtype."""
        entry = self.entries[name]
        values = torch.empty(count, dtype=DTYPES[entry.dtype])
        view, offset = memoryview(values.view(torch.uint8).numpy()), entry.begin + first * values.itemsize
        with self._reading() as descriptor:
            if _identity(descriptor) != self._identity:
                raise ValueError(f"{self.path} was replaced while it was read")
            while len(view):
                got = os.preadv(descriptor, [view], offset)  # at most 2 GB at once
                if not got:
                    raise ValueError(f"{self.path} became shorter while it was read")
                view, offset = view[got:], offset + got
        return values

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The part `slices` of the tensor, in the file's dtype; no other bytes are read."""
        return read_part(
            self.entries[name].shape, slices, lambda first, count: self.elements(name, first, count)
        )

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The flattened tensor in consecutive parts of CHUNK_BYTES."""
        count = self.entries[name].numel
        chunk = CHUNK_BYTES // DTYPES[self.entries[name].dtype].itemsize
        for first in range(0, count, chunk):
            yield self.elements(name, first, min(chunk, count - first))


def _identity(descriptor: int) -> tuple[int, int, int]:
    """(bytes, inode, time of the last change) of an open file: another file of the same path has others, and
    so has this one once it was written to."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_ino, status.st_mtime_ns


def _once(pairs: list[tuple[str, object]]) -> dict:
    """The JSON object of these names and values; raises ValueError where a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)!r} twice")
    return found


def read_part(shape: tuple[int, ...], slices: tuple[slice, ...], elements) -> torch.Tensor:
    """The part `slices` of a row-major tensor of `shape`.

    elements(first, count) is called for ranges of the flattened tensor in ascending order. Raises ValueError
    for a tensor of more than two dimensions that is not only cut along its first.
    """
    lengths = [part.stop - part.start for part in slices]
    width = torch.Size(shape[1:]).numel()
    if lengths[1:] == list(shape[1:]):
        first = slices[0].start * width if shape else 0
        return elements(first, torch.Size(lengths).numel()).view(lengths)
    if len(shape) != 2:
        raise ValueError(
            f"a part of a tensor of shape {shape} that cuts more than its first dimension: "
            "only matrices are cut so"
        )
    rows = [
        elements(row * width + slices[1].start, lengths[1]) for row in range(slices[0].start, slices[0].stop)
    ]
    return torch.stack(rows) if rows else elements(0, 0).view(lengths)


class TensorWriter:
    """A new safetensors file whose tensors are written in any order: {name: (dtype, shape)} says which.

    Threads may share it.
    """

    def __init__(
        self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ):
        offset, header, begins = 0, {"__metadata__": metadata}, {}
        for name, (dtype, shape) in tensors.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            begins[name], offset = offset, end
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)  # the library aligns the data to 8 bytes
        self._begins = {name: 8 + len(content) + begin for name, begin in begins.items()}
        self._path, self._descriptor = path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(len(content).to_bytes(8, "little") + content, 0)
        with naming(path):
            os.ftruncate(self._descriptor, 8 + len(content) + offset)

    def write(self, name: str, values: torch.Tensor, first: int = 0) -> None:
        """Write `values` into the flattened tensor, starting with element `first`."""
        self._write(as_bytes(values), self._begins[name] + first * values.itemsize)

    def _write(self, content, offset: int) -> None:
        view = memoryview(content)
        with naming(self._path):
            while len(view):
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def close(self) -> None:
        """Close the file, once it is on disk."""
        with naming(self._path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major; a copy only where it is not contiguous."""
    return memoryview(values.contiguous().flatten().view(torch.uint8).numpy())


def checksum(content) -> str:
    """The 128-bit XXH3 hash (https://xxhash.com) in hexadecimal: it finds damage, at the speed of memory."""
    return xxhash.xxh3_128_hexdigest(content)


def checksums(content: memoryview, chunk: int) -> list[str]:
    """The checksum of each `chunk` bytes of the content, of which the last may have fewer."""
    return [checksum(content[first : first + chunk]) for first in range(0, len(content), chunk)]


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value of a tensor on the CPU is NaN or infinite; without a copy of it."""
    if not values.numel() or not values.is_floating_point():
        return True
    least, most = torch.aminmax(values)  # of a NaN, both are NaN
    return math.isfinite(least) and math.isfinite(most)


def bands(shape: tuple[int, ...], itemsize: int, band_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of consecutive bands of at most `band_bytes`, but of at least one row."""
    rows, row_bytes = shape[0], max(1, torch.Size(shape[1:]).numel() * itemsize)
    step = max(1, band_bytes // row_bytes)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
