"""Counts, in a rank, what its process reads, opens, tokenizes and asks of the store, at marks of its path.

Python's ways to read a file are wrapped: os.preadv, os.pread and the objects of open(). What the kernel has
counted (rchar of /proc/self/io: all files, pipes and sockets) stands beside it in each mark. Files that are
mapped (safetensors' header check, memory-mapped tokens) are read by nobody in either.
"""

import builtins
import io
import json
import os
import re
import stat
import threading
import time
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from parallel.runtime import GraphListener

CHECKPOINT, MANIFEST, BASE, TOKENS, OTHER = "checkpoint", "manifest", "base", "tokens", "other"
KINDS = (CHECKPOINT, MANIFEST, BASE, TOKENS)
STORE = ("set", "get", "add", "wait", "check")  # the calls that markstep makes; gloo's own are not counted


def kind_of(path: str) -> str:
    """What a file is: part of a checkpoint, its manifest, the base model, tokens in a cache, or something
    else."""
    if re.search(r"/checkpoint-\d+[^/]*/", path):
        return MANIFEST if path.endswith("/manifest.json") else CHECKPOINT
    if path.endswith(".safetensors"):
        return BASE
    return TOKENS if "/tokens/" in path else OTHER


class Counts:
    """What this process has done so far. Threads of the process may count at once."""

    def __init__(self, file: Path):
        """`file`: where the marks go, a line of JSON each."""
        self._file, self._lock, self._kinds = file, threading.Lock(), {}
        self.read, self.opened, self.store, self.tokenized, self.most_open = (
            Counter(),
            Counter(),
            Counter(),
            0,
            0,
        )

    def has_read(self, kind: str, count: int) -> int:
        """`count` bytes of a file have been read; returns the count."""
        with self._lock:
            self.read[kind] += count
        return count

    def has_opened(self, path, descriptor: int | None = None) -> str:
        """A file has been opened; returns its kind. `descriptor`: one that os.preadv may be given."""
        kind = kind_of(os.path.realpath(path))
        with self._lock:
            self.opened[kind] += 1
            self._kinds[descriptor] = kind
            if kind != OTHER:
                self.most_open = max(self.most_open, open_files())
        return kind

    def has_tokenized(self, records: int) -> None:
        """The process has turned so many texts into tokens."""
        with self._lock:
            self.tokenized += records

    def has_asked(self, operation: str) -> None:
        """The process has sent a message to the store."""
        with self._lock:
            self.store[operation] += 1

    def kind(self, descriptor: int) -> str:
        """The kind of an open file."""
        return self._kinds.get(descriptor, OTHER)

    def mark(self, name: str) -> None:
        """Write down what was counted so far, at a place of the path with this name."""
        with open("/proc/self/io", encoding="ascii") as file:
            rchar, wchar = (int(line.split()[1]) for line in file.readlines()[:2])
        values = {"read": self.read, "opened": self.opened, "store": self.store, "tokenized": self.tokenized}
        values |= {"mark": name, "seconds": time.monotonic(), "rchar": rchar, "wchar": wchar}
        line = json.dumps(values | {"most_open": self.most_open} | private_memory()) + "\n"
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(line)


def open_files() -> int:
    """How many regular files this process has open; standard output and error do not count."""
    count = 0
    for each in os.listdir("/proc/self/fd"):
        try:
            count += int(each) > 2 and stat.S_ISREG(os.fstat(int(each)).st_mode)
        except OSError:  # the listing's own
            continue
    return count


def private_memory(process: int | str = "self") -> dict[str, int]:
    """{"private", "pss"}: bytes that only this process has in memory, and those with its share of what
    several have."""
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        found = {line.split()[0]: 1024 * int(line.split()[1]) for line in file.readlines()[1:]}
    return {"private": found["Private_Clean:"] + found["Private_Dirty:"], "pss": found["Pss:"]}


class Phases(GraphListener):
    """Marks that a rank is built."""

    def __init__(self, counts: Counts):
        self._counts = counts

    def tracing(self, name):
        if name == "build":
            self._counts.mark("filled")

    def started(self, name):
        if name == "build":
            self._counts.mark("built")


def begin(counts: Counts) -> None:
    """Count from here on. To be called after standin.install, before the program starts."""
    _count_reads(counts)
    _count_store(counts)
    _count_tokens(counts)
    _mark_phases(counts)


def _count_reads(counts):
    opens, real = os.open, {name: getattr(os, name) for name in ("preadv", "pread")}

    def opened(path, *arguments, **named):
        descriptor = opens(path, *arguments, **named)
        counts.has_opened(path, descriptor)
        return descriptor

    def preadv(descriptor, *arguments):
        return counts.has_read(counts.kind(descriptor), real["preadv"](descriptor, *arguments))

    def pread(descriptor, *arguments):
        content = real["pread"](descriptor, *arguments)
        counts.has_read(counts.kind(descriptor), len(content))
        return content

    os.open, os.preadv, os.pread = opened, preadv, pread
    plain = builtins.open

    def counted(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
        reads = set(mode) <= set("rbt") and isinstance(file, str | os.PathLike) and not more
        if not reads or kind_of(os.path.realpath(file)) == OTHER:
            return plain(file, mode, buffering, encoding, errors, newline, **more)
        raw = _CountedFile(file)
        raw.counts, raw.kind = counts, counts.has_opened(file)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = counted


class _CountedFile(io.FileIO):
    """A file, opened for reading, that counts."""

    def read(self, size=-1):
        return self.readall() if size is None or size < 0 else self._counted(super().read(size))

    def readall(self):
        return self._counted(super().readall())

    def readinto(self, buffer):
        return self.counts.has_read(self.kind, super().readinto(buffer))

    def _counted(self, content):
        self.counts.has_read(self.kind, len(content))
        return content


def _count_store(counts):
    def counted(name, ask):
        def call(store, *arguments):
            counts.has_asked(name)
            return ask(store, *arguments)

        return call

    for name in STORE:
        setattr(dist.Store, name, counted(name, getattr(dist.Store, name)))


def _count_tokens(counts):
    import data.tokens as tokens

    encode = tokens.encode

    def counted(texts, *arguments):
        counts.has_tokenized(len(texts))
        return encode(texts, *arguments)

    tokens.encode = counted


def _mark_phases(counts):
    import trainer.checkpoint.writer as writer
    from tools.bench_ranks.standin import StandInRuntime

    def marked(function, before, after):
        def call(*arguments, **named):
            counts.mark(before)
            result = function(*arguments, **named)
            counts.mark(after)
            return result

        return call

    dist.init_process_group = marked(dist.init_process_group, "prepared", "met")
    writer.Saver.save = marked(writer.Saver.save, "save", "copied")
    writer.Saver.wait = marked(writer.Saver.wait, "waits", "saved")
    StandInRuntime.when_created.append(lambda runtime: runtime.listeners.append(Phases(counts)))
    StandInRuntime.when_stepping.append(lambda step: counts.mark(f"step {step}"))
