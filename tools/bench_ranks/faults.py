"""Ten planted disagreements and faults: what the ranks print, and how long it takes until all have ended.

Each is planted in a job of 8 processes (or as many as there are) on two pretended machines, which does four
steps with a tiny model, from a folder of its machine's own: the model and a cache can differ there.
"""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import EIO, ENOSPC
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from data.token_cache import META, read_entry, write_entry
from tools.bench_ranks.standin import StandInRuntime, Wires

HOUR = 3600.0
AT_STEP = 3
PLANTED = "planted"  # a file with the time.monotonic() of a fault


@dataclass(frozen=True)
class Fault:
    """A fault, and what has to come of it.

    spoil(folder) is called before the start, of the second machine's folder, which has a link to each file of
    the model and a token cache. plant() is called in ranks of the second machine before their program starts:
    in the second where the fault is of `one`, else in all. line: a regular expression of what one of the
    processes has to print. goes_on: whether the job has to do all its steps all the same. resumes: it goes on
    from a checkpoint.
    """

    name: str
    line: str
    plant: Callable[[], None] = lambda: None
    spoil: Callable[[Path], None] = lambda folder: None
    one: bool = False
    goes_on: bool = False
    resumes: bool = False


def planted() -> None:
    """Write down that the fault begins now; the first process of several does."""
    try:
        with open(PLANTED, "x", encoding="ascii") as file:
            file.write(str(time.monotonic()))
    except FileExistsError:
        return


def at_step(function: Callable[[], None]) -> Callable[[], None]:
    """A plant that calls the function before step AT_STEP."""

    def step_begins(step):
        if step == AT_STEP:
            planted()
            function()

    return lambda: StandInRuntime.when_stepping.append(step_begins)


def _another_version():
    found = metadata.Distribution.version.fget

    def version(distribution):
        return "2.8.0" if distribution.metadata["Name"] == "torch" else found(distribution)

    metadata.Distribution.version, torch.__version__ = property(version), "2.8.0"


def _other_rows(folder: Path):
    """The machine's cache has the entry of the data set, whole, with other tokens in it."""
    [entry] = (folder / "cache" / "markstep" / "tokens").iterdir()
    aside = entry.rename(folder / "tokens")

    def write(directory):
        for file in aside.glob("*.*"):
            if file.name != META:
                shutil.copy(file, directory)
        tokens = np.fromfile(aside / "input_ids.bin", np.int32)
        tokens[::-1].tofile(directory / "input_ids.bin")
        return read_entry(aside)

    write_entry(entry, write)


def _no_shard(folder: Path):
    sorted((folder / "model").glob("*.safetensors"))[-1].unlink()


def _cannot_read():
    """Reads of a file of the checkpoint fail, as on a machine whose mount has gone: of one that a rank of it
    reads."""

    def failing(read):
        def call(descriptor, *arguments):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/rank-00006.safetensors"):
                raise OSError(EIO, os.strerror(EIO))
            return read(descriptor, *arguments)

        return call

    os.pread, os.preadv = failing(os.pread), failing(os.preadv)


def _sleep():
    time.sleep(HOUR)


def _stop_in_a_collective():
    send = Wires.send

    def stop(wires, other, tensor):
        Wires.send = send
        os.kill(os.getpid(), signal.SIGSTOP)
        send(wires, other, tensor)

    Wires.send = stop


def _fill_the_disk():
    def write(descriptor, content, offset):
        planted()
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    os.pwrite = write


def _set_the_clock():
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + HOUR
    time.time_ns = lambda: now_ns() + int(HOUR * 1e9)


def _come_late():
    time.sleep(LATE_SECONDS)


def _cut_the_connections():
    """End every connection of this process to the store."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # no socket, or the listing's own descriptor
            continue
        with connection:
            if connection.family != socket.AF_UNIX and _port(connection) == int(os.environ["MASTER_PORT"]):
                connection.shutdown(socket.SHUT_RDWR)


def _port(connection):
    try:
        return connection.getpeername()[1]
    except OSError:
        return None


RANK, RANKS = r"rank 5 on machine-1\b", r"ranks? (4|5|6|7|4-7)( \(machine 1\)| on machine-1)"
LATE_SECONDS = 35.0  # more than until somebody says for whom it waits, less than --stall_minutes
FAULTS = [
    Fault("another version on one rank", RANK + ".*2.8.0", _another_version, one=True),
    Fault("another cache on one machine", RANKS, spoil=_other_rows),
    Fault("a shard of the model missing on one machine", RANKS + ".*safetensors", spoil=_no_shard),
    Fault("a file of the checkpoint that one machine cannot read", RANKS, _cannot_read, resumes=True),
    Fault("a rank that sleeps", RANK, at_step(_sleep), one=True),
    Fault("a rank that is stopped in a collective", RANK, at_step(_stop_in_a_collective), one=True),
    Fault("a full disk on one machine", RANKS + ".*No space left", _fill_the_disk),
    Fault("a clock an hour off on one machine", "clock of " + RANKS, _set_the_clock, goes_on=True),
    Fault(f"a machine that comes {LATE_SECONDS:.0f} s late", RANKS, _come_late, goes_on=True),
    Fault("a store that one rank loses", RANK, at_step(_cut_the_connections), one=True),
]
