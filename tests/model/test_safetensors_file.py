"""Which safetensors files are refused: all that the library refuses, by the file's name, in one line."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.weights import descriptors
from model.weights.descriptors import Descriptors
from model.weights.safetensors_file import TensorFile
from model.weights.sources import SafetensorsFiles

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def header(**changes):
    return json.dumps({"a": A | changes})


def with_metadata(value):
    return json.dumps({"__metadata__": value, "a": A})


REFUSED = {
    "unknown dtype": (header(dtype="F33"), 24),
    "dtype in lower case": (header(dtype="f32"), 24),
    "size of a dtype that is not read": (header(dtype="F8_E4M3"), 24),
    "half a byte": (header(dtype="F4", shape=[3], data_offsets=[0, 2]), 2),
    "negative shape": (header(shape=[-2, -3]), 24),
    "fractional shape": (header(shape=[2.0, 3.0]), 24),
    "true in a shape": (header(shape=[True, 6]), 24),
    "shape too large": (header(shape=[2**62, 2**62]), 24),
    "fractional offset": (header(data_offsets=[0.0, 24.0]), 24),
    "false as an offset": (header(data_offsets=[False, 24]), 24),
    "minus 0": (header().replace("[0,", "[-0,"), 24),
    "three offsets": (header(data_offsets=[0, 24, 24]), 24),
    "offsets the wrong way": (header(data_offsets=[24, 0]), 24),
    "overlap": (json.dumps({"a": A, "b": A}), 24),
    "hole": (json.dumps({"a": A, "b": A | {"data_offsets": [28, 52]}}), 52),
    "hole at the beginning": (header(data_offsets=[4, 28]), 28),
    "trailing bytes": (header(), 28),
    "too short": (header(), 20),
    "wrong size": (header(shape=[2, 2]), 24),
    "number in the metadata": (with_metadata({"a": 1}), 24),
    "null in the metadata": (with_metadata({"a": None}), 24),
    "list as metadata": (with_metadata([]), 24),
    "metadata of pairs": (with_metadata([["a", "b"]]), 24),
    "false as metadata": (with_metadata(False), 24),
    "metadata twice": ('{"__metadata__": {}, "__metadata__": {},' + header()[1:], 24),
    "field twice": (header().replace('"dtype"', '"dtype": "F16", "dtype"'), 24),
    "UTF-16": (header().encode("utf-16"), 24),
    "byte order mark": (b"\xef\xbb\xbf" + header().encode(), 24),
    "not UTF-8": (b'{"\xe9": ' + header()[5:].encode(), 24),
    "surrogate": (b'{"\xed\xa0\x80": ' + header()[5:].encode(), 24),
    "escaped surrogate": ('{"\\ud800": ' + header()[5:], 24),
    "NaN": (header(more=float("nan")), 24),
    "number too large": (header().replace("[2, 3]", "[2, 3e400]"), 24),
    "zeros after the header": (header() + "\0\0", 24),
    "list": ("[]", 0),
    "deep": ('{"a":' + "[" * 5000 + "]" * 5000 + "}", 0),
    "empty": ("", 0),
}


def write(path, content, data):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(data))
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_library_refuses_is_refused(tmp_path, kind):
    path = write(tmp_path / "model.safetensors", *REFUSED[kind])
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").__enter__()
    with pytest.raises(ValueError) as caught:
        TensorFile(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize("length", [10**8 + 1, 2**63, 2**64 - 1, 0, 1])
def test_the_length_of_the_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        TensorFile(path)


def test_a_name_that_comes_twice(tmp_path):
    """The library takes the last: which of the two was meant is not known."""
    path = write(tmp_path / "model.safetensors", header(shape=[3, 2])[:-1] + "," + header()[1:], 24)
    with pytest.raises(ValueError, match="its header: it has 'a' twice"):
        TensorFile(path)


def test_what_the_library_writes_is_read(tmp_path):
    values = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(1),
    }
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and set(file.entries) == set(values)
    for name, value in values.items():
        assert torch.equal(file.read(name, tuple(slice(0, size) for size in value.shape)), value)


def test_a_file_that_is_read_stays_open(tmp_path):
    """Two may be open, and both are being read: who wants a third one waits. Then the oldest is closed."""
    files, pool = [tmp_path / str(number) for number in range(3)], Descriptors(2)
    for path in files:
        path.write_text(path.name)

    def read(path):
        with pool.reading(path, path) as descriptor:
            return os.pread(descriptor, 1, 0).decode(), descriptor

    with ThreadPoolExecutor(1) as thread, pool.reading(files[1], files[1]) as second:
        with pool.reading(files[0], files[0]):
            third = thread.submit(read, files[2])
            with pytest.raises(TimeoutError):
                third.result(0.2)
        assert third.result(60)[0] == "2"  # in place of the first
        assert os.pread(second, 1, 0) == b"1"
    assert read(files[0])[0] == "0" and read(files[2]) == ("2", third.result()[1])
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_file_is_collected_at_any_moment(tmp_path):
    """Python may call __del__ of a file before any line of opening another one. The file is closed then."""
    files = [tmp_path / str(number) for number in range(3)]
    for path in files:
        path.write_text(path.name)

    def is_open(path):
        return any(file.resolve() == path for file in Path("/proc/self/fd").iterdir())

    def read(path):
        with pool.reading(path, path) as descriptor:
            return os.pread(descriptor, 1, 0).decode()

    def trace(frame, event, _):
        if frame.f_code.co_filename == descriptors.__file__ and event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == moment:
                pool.close_later(files[0])
        return trace

    moment, lines = 0, []
    while moment <= len(lines):
        pool, lines, moment = Descriptors(2), [], moment + 1
        assert read(files[0]) == "0" and read(files[1]) == "1" and is_open(files[0])
        sys.settrace(trace)
        try:
            found = read(files[2])
        finally:
            sys.settrace(None)
        assert found == "2" and read(files[1]) == "1" and not is_open(files[0])
        for path in files:
            pool.close(path)
    assert moment > 20 and not any(map(is_open, files))


def test_a_file_that_was_replaced_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    file = TensorFile(path)
    file.close()
    assert torch.equal(file.elements("a", 0, 3), torch.zeros(3))  # opened anew
    file.close()
    path.rename(tmp_path / "old")
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="x.safetensors was replaced while it was read"):
        file.elements("a", 0, 3)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes())  # in place, and as long
    os.utime(path, (2e9, 2e9))  # later, also where the clock of files is slow
    with pytest.raises(ValueError, match="x.safetensors was replaced while it was read"):
        file.elements("a", 0, 3)
