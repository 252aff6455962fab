"""Which ranks are late, whose stacks tell why, and how a report says so in a few lines."""

from parallel.runtime.peers import ranks_in_words
from parallel.runtime.progress import Place

STACKS_PER_HOST = 4  # of late ranks
LINES = 10  # of each kind, in a report that is printed
NOBODY = "no rank is behind the others: a device or the network does not get on, or all wait for one file"

# What a rank tells of its place: the fields of a Place and its Phase, `host`, `pid`, `age` in seconds, and
# `seen`, the number of the newest message that it has read. None of a rank that has not told anything yet.
Told = dict | None


def told(place: Place) -> dict:
    """The place as a rank tells it; its age is another's to add."""
    phase = place.phase._asdict()
    return {"count": place.count, "step": place.step, "graph": place.graph} | phase


def who_is_late(places: list[Told], silent: set[int], allowed: float) -> list[int] | None:
    """The ranks for which the others wait; [] where none is behind. None where those are compiling, or are in
    another phase that is slow, for at most `allowed` seconds.

    places: by rank. silent: the ranks that do not answer. They are late; so are others that are no further
    than one of these was last seen, and do not wait. Where all answer, those are late that have got through
    the fewest mark_steps, and, among these, do not wait.
    """
    order = {
        rank: (place["count"], place["waits"]) for rank, place in enumerate(places) if rank not in silent
    }
    least = min(order.values())
    behind = [rank for rank, each in order.items() if each == least]
    if silent:
        counts = [places[rank]["count"] if places[rank] else 0 for rank in silent]
        behind = [rank for rank in behind if order[rank] < (max(counts), True)]
    slow = {rank for rank in behind if places[rank]["slow"] and places[rank]["age"] <= allowed}
    late = sorted(silent.union(behind) - slow)
    if not late:
        return None if slow else []
    return late if silent or len(late) < len(places) else []


def whose_stacks(places: list[Told], late: list[int], silent: set[int]) -> tuple[list[int], dict]:
    """(the ranks that shall write their stacks, {a rank: {a silent one on its machine: its process number}}).

    They are the first rank of each machine and a few late ones; for a silent one another one looks.
    """
    first: dict[str, int] = {}
    for rank, place in enumerate(places):
        if rank not in silent:
            first.setdefault(place["host"], rank)
    few: dict[str, list[int]] = {}
    for rank in late:
        if places[rank]:
            few.setdefault(places[rank]["host"], []).append(rank)
    chosen = [rank for ranks in few.values() for rank in ranks[:STACKS_PER_HOST]]
    own = sorted({*first.values(), *chosen} - silent)
    outside: dict[str, dict[str, int]] = {}
    for rank in chosen:
        helper = first.get(places[rank]["host"])
        if rank in silent and helper is not None:
            outside.setdefault(str(helper), {})[str(rank)] = places[rank]["pid"]
    return own, outside


def place_of(place: Told) -> str:
    """A place in words: `step 12, graph update, tracing`."""
    step = f"step {place['step']}" if place["step"] else ""
    graph = f"graph {place['graph']}" if place["graph"] else ""
    return ", ".join(filter(None, (step, graph, place["text"])))


def places_in_words(places: list[Told], late: list[int]) -> list[str]:
    """A line for each place that ranks have that are not late: `ranks 0-6, 8-63: step 12, ...`."""
    others = {rank: place_of(places[rank]) for rank in sorted(set(range(len(places))) - set(late))}
    return [f"{ranks_in_words(ranks)}: {words}" for words, ranks in _by_value(others)]


def late_in_words(places: list[Told], late: list[int], silent: set[int], found: dict[int, str]) -> list[str]:
    """A line for late ranks that are alike: `late: rank 7 on HOST: step 12, ..., for 16 min; in FILE:LINE`.

    found: what was found out about some of them, in words.
    """
    words = {}
    for rank in late:
        place, more = places[rank], found.get(rank)
        if not place:
            words[rank] = "has not come"
        elif rank in silent:
            why = f": {more}" if more else ""
            words[rank] = f"does not answer{why}; it was last seen at {place_of(place)}"
        else:
            line = f"; in {more}" if more else ""
            words[rank] = f"{place_of(place)}, for {duration(place['age'])}{line}"
    return [
        f"late: {ranks_in_words(ranks)}{_on_hosts(places, ranks)}: {each}" for each, ranks in _by_value(words)
    ]


def shortened(lines: list[str]) -> list[str]:
    """The first LINES lines, and how many more there are."""
    more = len(lines) - LINES
    return [*lines[:LINES], *([f"... and {more} more such lines"] if more > 0 else [])]


def duration(seconds: float) -> str:
    """`12 s`, `16 min`, or `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _by_value(words: dict[int, str]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for rank, each in words.items():
        groups.setdefault(each, []).append(rank)
    return list(groups.items())


def _on_hosts(places, ranks) -> str:
    hosts = list(dict.fromkeys(places[rank]["host"] for rank in ranks if places[rank]))
    more = f" and {len(hosts) - 3} more machines" if len(hosts) > 3 else ""
    return f" on {', '.join(hosts[:3])}{more}" if hosts else ""
