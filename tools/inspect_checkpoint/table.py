"""Tables on the terminal, with a line for tensors that differ only in the number of their layer."""

import re
from collections.abc import Callable, Hashable, Iterable

from tools.inspect_checkpoint.tensors import Tensors

MB = 10**6


def group_layers(names: Iterable[str], alike: Callable[[str], Hashable]) -> dict[str, list[str]]:
    """{label: names}: names that differ only in their layer's number, and for which `alike` is the same.

    A label of several is layers.{0..3}.w, or layers.{0,2}.w.
    """
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault((re.sub(r"\.\d+\.", ".#.", name, count=1), alike(name)), []).append(name)
    labels = {}
    for (pattern, _), members in groups.items():
        if len(members) > 1:
            numbers = sorted(int(re.search(r"\.(\d+)\.", name)[1]) for name in members)
            span = (
                ",".join(map(str, numbers))
                if len(numbers) <= numbers[-1] - numbers[0]
                else f"{numbers[0]}..{numbers[-1]}"
            )
            pattern = pattern.replace("#", f"{{{span}}}")
        labels[pattern if len(members) > 1 else members[0]] = members
    return labels


def print_table(header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print columns as wide as they need. Each title begins with < or >, which aligns its column."""
    lines = [[title[1:] for title in header], *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(
                f"{text:{title[0]}{width}}" for text, title, width in zip(line, header, widths, strict=True)
            ).rstrip()
        )


def shape_and_dtype(tensors: Tensors, name: str) -> tuple[str, str]:
    """The shape and the dtype of a tensor, as text."""
    shape = " x ".join(map(str, tensors.shapes[name])) or "scalar"
    return shape, str(tensors.dtype(name)).removeprefix("torch.")
