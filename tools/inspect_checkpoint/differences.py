"""Compare two checkpoints or models: their settings, and their tensors value by value."""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tools.inspect_checkpoint.table import group_layers, print_table, shape_and_dtype
from tools.inspect_checkpoint.tensors import Tensors


def show_differences(a: Tensors, b: Tensors, paths: tuple[Path, Path]) -> int:
    """Print in what two differ; returns the exit status: 1 where a tensor is not equal to the bit."""
    print_settings(a, b, paths)
    print()
    names = dict.fromkeys([*a.shapes, *b.shapes])

    def compare(name):
        alike = name in a.shapes and a.shapes[name] == b.shapes.get(name)
        return difference(a.stream(name), b.stream(name)) if alike else (False, math.nan, math.nan)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(compare, names), strict=True))
    print_tensors(a, b, paths, found)
    differ = sum(not equal for equal, _, _ in found.values())
    print(
        f"\n{differ} of {len(found)} tensors differ"
        if differ
        else f"\nall {len(found)} tensors are equal to the bit"
    )
    return int(bool(differ))


def print_settings(a: Tensors, b: Tensors, paths: tuple[Path, Path]) -> None:
    """Print a table of the settings that differ."""
    keys = [
        key
        for key in dict.fromkeys([*a.settings, *b.settings])
        if a.settings.get(key, a) != b.settings.get(key, b)
    ]
    rows = [
        (key, *(json.dumps(each.settings[key]) if key in each.settings else "-" for each in (a, b)))
        for key in keys
    ]
    print_table(("<setting", *(f"<{path}" for path in paths)), rows or [("all are the same", "", "")])


def print_tensors(
    a: Tensors, b: Tensors, paths: tuple[Path, Path], found: dict[str, tuple[bool, float, float]]
) -> None:
    """Print a table of all tensors. `found`: what `difference` returned for each, by name."""

    def layout(name):
        holders = [(path, each) for path, each in zip(paths, (a, b), strict=True) if name in each.shapes]
        shape, dtype = zip(*(shape_and_dtype(each, name) for _, each in holders), strict=True)
        where = "both" if len(holders) > 1 else holders[0][0]
        return " and ".join(dict.fromkeys(shape)), " and ".join(dict.fromkeys(dtype)), where

    rows = []
    for label, members in group_layers(found, layout).items():
        equal, *apart = zip(*(found[name] for name in members), strict=True)
        numbers = (f"{worst(*each):.3g}" for each in apart)
        rows.append((label, *layout(members[0]), f"{sum(equal)} of {len(equal)}", *numbers))
    print_table(("<tensor", "<shape", "<dtype", "<in", ">equal", ">max |difference|", ">relative"), rows)


def difference(a: Iterator[torch.Tensor], b: Iterator[torch.Tensor]) -> tuple[bool, float, float]:
    """(equal to the bit, max |a - b|, |a - b| / |a|) of two tensors in bands."""
    equal, largest, squares, norm = True, 0.0, 0.0, 0.0
    for one, other in zip(a, b, strict=True):
        norm += float(torch.linalg.vector_norm(one.float(), dtype=torch.float64)) ** 2
        if one.dtype == other.dtype and torch.equal(
            one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
        ):
            continue
        apart = (one.double() - other.double()).abs()
        equal = False
        squares += float(apart.square().sum())
        largest = worst(largest, float(apart.max()))
    return equal, largest, math.sqrt(squares / norm) if norm else math.inf if squares else 0.0


def worst(*values: float) -> float:
    """The largest; not-a-number is worse than any."""
    return max(values, key=lambda value: (math.isnan(value), value))
