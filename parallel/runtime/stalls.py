"""Who is late when a job does not move: found by the ranks themselves, through the store.

Each rank keeps its place (parallel/runtime/progress.py) in the store. A rank that has not moved for long
posts a message to all; those that can, answer with their place and its age (durations, because clocks of
machines differ). Who does not answer, or is behind the others, is late. A second message asks some for their
stacks.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from parallel.graph import backend
from parallel.runtime.late import (
    NOBODY,
    duration,
    late_in_words,
    place_of,
    places_in_words,
    shortened,
    told,
    who_is_late,
    whose_stacks,
)
from parallel.runtime.peers import Peers, say
from parallel.runtime.progress import COMPILING, STARTING, TRACING, Place, Progress, here
from parallel.runtime.stacks import (
    SIGNAL,
    SignalAnswers,
    line_of_python,
    own_stacks,
    stacks_from_outside,
    state_of,
)
from parallel.runtime.watch import KEY

SLOW = 8  # so many times as long may a compilation take: neuronx-cc can need an hour
GRACE_SECONDS = 30.0  # after which another rank reports in place of rank 0
PATIENCE_SECONDS = 10.0  # for which answers are waited for: ranks look once a second
DISK_SECONDS = 2.0  # for which the thread of the watch waits for a file
PORTION = 64  # values that are read at once


@dataclass
class Round:
    """What the rank that reports knows so far: the `number` of the message that asked for places, that which
    asked for `stacks`, and when the last one was `sent`; what was answered, and whose stacks are expected."""

    number: int
    sent: float
    stacks: int | None = None
    places: list[dict | None] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    directory: str = ""


class Stalls:
    """One rank's part. Its thread is that of parallel/runtime/watch.py, which calls `look` once a second."""

    def __init__(
        self,
        peers: Peers,
        progress: Progress,
        output_dir: str,
        seconds: float,
        ends: bool,
        clock=time.monotonic,
    ):
        """seconds: after which a rank that has not moved is looked into. ends: whether the job ends then."""
        self._peers, self._progress, self._clock = peers, progress, clock
        self._output, self._seconds, self._ends = Path(output_dir), seconds, ends
        self._patience = min(PATIENCE_SECONDS, seconds)
        self._grace = 0.0 if peers.is_first else min(GRACE_SECONDS, seconds)
        self._published: Place | None = None
        self._stood = progress.place  # where it was at the last look
        self._again: float | None = None  # after a message, the time at which it may ask once more
        self._seen = 0  # the number of the newest message
        self._round: Round | None = None
        self._reported = False

    def look(self, store) -> None:
        """Publish where this rank is, answer messages, and report where nothing moves."""
        now, stands = self._clock(), self._progress.place
        place = self._named(stands)
        if stands is not self._stood:
            if self._reported:
                stood = duration(stands.since - self._stood.since)
                say(f"rank {self._peers.rank} moves again after {stood}: {place_of(told(place))}")
            self._stood, self._again, self._round, self._reported = stands, None, None, False
        if place != self._published:
            self._publish(store, place, now)
        messages = store.add("stalls/messages", 0)
        while self._seen < messages:
            self._seen += 1
            self._answer(store, json.loads(store.get(f"stalls/message/{self._seen}")))
        if self._round:
            self._go_on(store, self._round, now)
        elif self._is_due(place, now) and (number := self._post(store, {"kind": "places"})):
            self._round = Round(number, now)

    def _named(self, place: Place) -> Place:
        """The place, with the compilation that is going on in it."""
        compiles = place.phase in (TRACING, STARTING) and backend.is_compiling()
        return place._replace(phase=COMPILING) if compiles else place

    def _is_due(self, place: Place, now: float) -> bool:
        """Whether this rank has stood so long that it asks the others."""
        return now >= (self._again or place.since + self._limit(place)) + self._grace

    def _limit(self, place: Place) -> float:
        return self._seconds * (SLOW if place.phase.slow else 1)

    def _publish(self, store, place: Place, now: float) -> None:
        self._published = place
        process = {"host": self._peers.host, "pid": os.getpid(), "seen": self._seen}
        value = told(place) | {"age": round(now - place.since, 1)} | process
        store.set(f"progress/{self._peers.rank}", json.dumps(value))

    def _post(self, store, message: dict) -> int | None:
        """Send a message to all ranks; returns its number, or None where another rank was faster."""
        number = self._seen + 1
        if store.add(f"stalls/claim/{number}", 1) != 1:
            return None
        store.set(f"stalls/message/{number}", json.dumps(message))
        return store.add("stalls/messages", 1)

    def _answer(self, store, message: dict) -> None:
        if message["kind"] == "places":
            place, now = self._named(self._progress.place), self._clock()
            self._again = now + max(now - place.since, self._limit(place))  # at twice its age
            self._publish(store, place, now)
            return
        rank = self._peers.rank
        found = {rank: (own_stacks(), line_of_python())} if rank in message["own"] else {}
        others = message["outside"].get(str(rank), {})
        for other, text in zip(others, stacks_from_outside(list(others.values())), strict=True):
            found[int(other)] = text, state_of(others[other])
        for each, (_, words) in found.items():
            store.set(f"stalls/found/{self._seen}/{each}", words)
        for each, (text, _) in found.items():
            self._write(message["directory"], f"rank-{each:05}.txt", text)

    def _go_on(self, store, current: Round, now: float) -> None:
        """The part of the rank that reports: look whether the answers have come, and act on them."""
        if current.stacks:
            keys = [f"stalls/found/{current.stacks}/{rank}" for rank in current.expected]
            if store.check(keys) or now - current.sent >= self._patience:
                self._report(store, current, now)
            return
        places = self._places(store)
        silent = [rank for rank, each in enumerate(places) if not each or each["seen"] < current.number]
        if silent and now - current.sent < self._patience:
            return
        late = who_is_late(places, set(silent), SLOW * self._seconds)
        if late is None:
            self._round, self._again = None, now + self._seconds
            return
        own, outside = whose_stacks(places, late, set(silent))
        current.directory = time.strftime("%Y-%m-%d-%H-%M-%S")
        current.stacks = self._post(
            store, {"kind": "stacks", "directory": current.directory, "own": own, "outside": outside}
        )
        current.expected = [*own, *(int(rank) for asked in outside.values() for rank in asked)]
        current.places, current.late, current.silent, current.sent = places, late, silent, now
        if not current.stacks:
            self._round = None  # another rank has begun to report, too

    def _places(self, store) -> list[dict | None]:
        """What each rank has published last; None where it has published nothing."""
        places = []
        for first in range(0, self._peers.world_size, PORTION):
            ranks = range(first, min(first + PORTION, self._peers.world_size))
            keys = [f"progress/{rank}" for rank in ranks]
            there = keys if store.check(keys) else [key for key in keys if store.check([key])]
            found = dict(zip(there, store.multi_get(there), strict=True)) if there else {}
            places += [json.loads(found[key]) if key in found else None for key in keys]
        return places

    def _report(self, store, current: Round, now: float) -> None:
        """Print what is known, and write it; under `ends`, let all ranks end (parallel/runtime/watch.py)."""
        self._round, self._reported = None, True
        keys = {rank: f"stalls/found/{current.stacks}/{rank}" for rank in current.expected}
        found = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        age = duration(now - self._stood.since)
        head = f"stalled: rank {self._peers.rank} on {self._peers.host} has not moved for {age}"
        where = places_in_words(current.places, current.late)
        late = late_in_words(current.places, current.late, set(current.silent), found) or [NOBODY]
        folder = self._output / "stalls" / current.directory
        if self._ends:
            ended = f"nothing has moved for {age} (--on_stall end); {late[0]}; see {folder}"
            store.compare_set(KEY, "", ended)  # an error of a rank would be the better reason
        lines = [*shortened(where), *shortened(late), f"stacks of ranks, and all of this: {folder}"]
        say("\n  ".join([head, *lines]))
        self._write(current.directory, "report.txt", "\n".join([head, *where, *late, ""]))

    def _write(self, directory: str, name: str, text: str) -> None:
        """Write a file of OUT/stalls, and wait for it for a moment: a file system that does not answer may be
        why nothing moves. Where it cannot be written, a warning is enough."""
        path = self._output / "stalls" / directory / name

        def write():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                say(f"warning: {path} cannot be written: {error.strerror}")

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(DISK_SECONDS)


def watch_stalls(peers: Peers, output_dir: str, minutes: float, ends: bool) -> None:
    """From here on this process takes part in looking for late ranks; nothing where it is the only one.

    `minutes` and `ends` are --stall_minutes and whether --on_stall is `end`.
    """
    if peers.store:
        stalls = Stalls(peers, here(), output_dir, 60 * minutes, ends)
        stalls.look(peers.store)  # so that it is known even where its thread never comes to look
        peers.looks += [Asked(peers), stalls]
        peers.limit_seconds = 60 * minutes


class Asked:
    """Prints the stacks of this process after somebody has sent it stacks.SIGNAL."""

    def __init__(self, peers: Peers):
        self._name, self._answers = peers.name_of(peers.rank), SignalAnswers()

    def look(self, store) -> None:
        """Print what the signal's handler has written since the last call."""
        if said := self._answers.take():
            say(f"stacks of {self._name}, asked for by {SIGNAL.name}:\n{said}")
