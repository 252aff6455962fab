"""What grows with the number of ranks, from two starts that were measured: of all ranks, and of half.

Both resume a checkpoint that all ranks have written. What all processes together do is taken as a + b x
ranks, neither below 0: a for what is done once, b for what each does. A manifest grows
with the ranks of the job that wrote it, less than they do: only its lines of files do. What is read of
manifests is multiplied by the ranks, so it is an upper bound.
"""

RANKS = (1024, 2048)
FILES, MESSAGES, MANIFEST = (
    "start: files opened",
    "start: messages to the store",
    "start: MB of manifest read",
)
LINEAR = ("start: times the checkpoint was read", "start: times the base was read", MANIFEST, FILES, MESSAGES)


def extrapolate(found: dict) -> dict[str, dict[str, float]]:
    """{figure: {number of ranks: value}} of what walk() has found, with the store's messages a second."""
    ranks = found["ranks"]
    whole, half = found["runs"]["restart"], found["runs"]["resume on half"]
    result = {}
    for figure in LINEAR:
        once, each = line(ranks // 2, half[figure], ranks, whole[figure])
        grows = {number: number / ranks if figure == MANIFEST else 1.0 for number in (ranks, *RANKS)}
        result[figure] = {str(number): (once + each * number) * by for number, by in grows.items()}
    speed = min(found["store"].values())
    result["s of the store at the start"] = {
        number: messages / speed for number, messages in result[MESSAGES].items()
    }
    return result


def line(x: float, at_x: float, more: float, at_more: float) -> tuple[float, float]:
    """(a, b) of the line a + b x through two points, with neither below 0."""
    slope = max(0.0, (at_more - at_x) / (more - x))
    once = max(0.0, at_more - slope * more)
    return once, (at_more - once) / more
