"""The Python stacks of a rank that is stuck: written by itself, or, where it cannot, found from outside.

A process that gets SIGUSR1 writes its stacks into a file in memory, in the signal's handler, which needs no
GIL. Another process of the same machine and user can read that file.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

SIGNAL = signal.SIGUSR1  # launch scripts use SIGTERM and SIGUSR2, Ctrl-C is SIGINT
NAME = "markstep-stacks"
SECONDS = 1.0  # for which another process's handler is waited for


class SignalAnswers:
    """Lets this process write its stacks whenever it gets SIGNAL, also while a thread holds the GIL."""

    def __init__(self):
        self._file, self._shown = os.memfd_create(NAME), 0
        faulthandler.register(SIGNAL, file=self._file, all_threads=True)

    def take(self) -> str:
        """What was written since the last call."""
        new = os.pread(self._file, 1 << 20, self._shown)
        self._shown += len(new)
        return new.decode(errors="replace")


def own_stacks() -> str:
    """The stacks of all threads of this process, with their lines; the main thread's first."""
    names, main = {each.ident: each.name for each in threading.enumerate()}, threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(number, number)}:\n" + "".join(traceback.format_stack(frame))
        for number, frame in frames
        if number != threading.get_ident()
    )


def line_of_python() -> str:
    """Where the main thread is: `FILE:LINE, FUNCTION`."""
    frame = sys._current_frames()[threading.main_thread().ident]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"


def stacks_from_outside(processes: list[int]) -> list[str]:
    """For each process number of this machine what the kernel says of it, and its stacks, where it can still
    be asked for them. Takes SECONDS."""
    before, asked = {process: _told(process) for process in processes}, False
    for process in filter(_can_answer, processes):
        with suppress(OSError):  # it has ended meanwhile
            os.kill(process, SIGNAL)
            asked = True
    if asked:
        time.sleep(SECONDS)
    nothing = "It did not write its Python stacks.\n"
    return [
        f"{_described(process)}\n{_told(process)[len(before[process]) :] or nothing}" for process in processes
    ]


def _told(process: int) -> str:
    """All that a process has written when it was asked."""
    for link in _listed(f"/proc/{process}/fd"):
        try:
            if NAME in os.readlink(link):
                return link.read_text(errors="replace")
        except OSError:
            continue
    return ""


def _can_answer(process: int) -> bool:
    """Whether SIGNAL would be handled at once: another process would be killed by it, a stopped one handles
    it when it goes on."""
    fields = dict(re.findall(r"^(SigCgt|State):\t(\w+)", _read(f"/proc/{process}/status"), re.MULTILINE))
    handled = int(fields.get("SigCgt", "0"), 16) >> (SIGNAL - 1) & 1
    return bool(handled) and fields["State"] not in "TtZX"


def _described(process: int) -> str:
    """Command line, and the state of each thread with the function of the kernel in which it is."""
    command = _read(f"/proc/{process}/cmdline").replace("\0", " ").strip()
    if not command:
        return f"process {process} is not there, or not one of this user"
    states = "R runs, S sleeps, D waits in the kernel, T is stopped"
    lines = [f"process {process}: {command}", f"threads, their states ({states}), and where in the kernel:"]
    for task in _listed(f"/proc/{process}/task"):
        name, _, rest = _read(f"{task}/stat").partition("(")[2].rpartition(")")
        if rest:
            lines.append(f"  {task.name} {name}: {rest.split()[0]} {_read(f'{task}/wchan')}")
    return "\n".join(lines) + "\n"


def state_of(process: int) -> str:
    """What the kernel says of a process of this machine, in words."""
    rest = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    if not rest:
        return "its process is not there"
    words = {
        "T": "its process is stopped",
        "t": "a debugger has stopped its process",
        "Z": "its process has ended",
        "D": "its process waits in the kernel",
    }
    return words.get(rest[0], "a call that does not return holds its Python")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _listed(path: str) -> list[Path]:
    try:
        return sorted(Path(path).iterdir(), key=lambda each: int(each.name))
    except OSError:
        return []
