"""What the ranks of an attempt have read, opened, asked and waited for, from their marks."""

from itertools import pairwise

from tools.bench_ranks import counting
from tools.bench_ranks.cluster import Attempt

Marks = dict[int, list[dict]]  # of each rank


def figures(attempt: Attempt, sizes: dict[str, int]) -> dict[str, float | None]:
    """{figure: value}, of all ranks together unless it says otherwise; None where they did not come so far.

    `sizes`: the bytes of a checkpoint and of the base model, by kind of file. A start ends when the rank has
    built its model and optimizer.
    """
    marks = attempt.marks()
    built = [_first(each, "built") or each[-1] for each in marks.values()]
    last = [each[-1] for each in marks.values()]
    return {
        **_seconds(attempt, marks),
        **{f"start: {name}": value for name, value in _totals(built, sizes).items()},
        **{f"all: {name}": value for name, value in _totals(last, sizes).items()},
        "texts tokenized": sum(each["tokenized"] for each in last),
        "files open at once, one rank": max(each["most_open"] for each in last),
        "private MB, one rank": max(mark["private"] for each in marks.values() for mark in each) / 1e6,
        "GB in memory": attempt.peak / 1e9,
    }


def _totals(marks: list[dict], sizes: dict[str, int]) -> dict[str, float]:
    """Of one mark of each rank."""
    read = {kind: sum(mark["read"].get(kind, 0) for mark in marks) for kind in counting.KINDS}
    opened = sum(mark["opened"].get(kind, 0) for mark in marks for kind in counting.KINDS)
    return {
        **{f"times the {kind} was read": read[kind] / size for kind, size in sizes.items()},
        **{f"MB of {kind} read": count / 1e6 for kind, count in read.items()},
        "MB of other files read": (sum(mark["rchar"] for mark in marks) - sum(read.values())) / 1e6,
        "files opened": opened,
        "messages to the store": sum(sum(mark["store"].values()) for mark in marks),
    }


def _seconds(attempt: Attempt, marks: Marks) -> dict[str, float | None]:
    steps = [mark["seconds"] for mark in marks[0] if mark["mark"].startswith("step ")]
    spans = sorted(after - before for before, after in pairwise(steps))
    begun, copied = (_first(marks[0], name) for name in ("save", "copied"))
    return {
        "s until all have started": _latest(marks, "started"),
        "s until all are prepared": _latest(marks, "prepared"),
        "s until all are built": _latest(marks, "built"),
        "s of a step": spans[len(spans) // 2] if spans else None,
        "s that a save held up": copied["seconds"] - begun["seconds"] if copied else None,
        "s in all": attempt.seconds,
    }


def _latest(marks: Marks, name: str) -> float | None:
    """When the last rank has come to a mark."""
    found = [_first(each, name) for each in marks.values()]
    return None if None in found else max(mark["seconds"] for mark in found)


def _first(marks: list[dict], name: str) -> dict | None:
    return next((mark for mark in marks if mark["mark"] == name), None)
