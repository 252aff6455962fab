"""What a checkpoint, an output directory or a model holds, and whether it is whole; of two of them, in what
they differ.

    python -m tools.inspect_checkpoint DIR [OTHER]

Each is a checkpoint, a Hugging Face model or a peft adapter in safetensors; DIR alone may hold checkpoints.
The exit status is 1 where a checksum does not hold; of two, where a tensor is not equal to the bit. Tensors
are read in bands of rows.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from model.weights.hub import read_json
from model.weights.safetensors_file import bands
from model.weights.sources import SafetensorsFiles
from trainer.checkpoint.names import INCOMPLETE, KINDS, MANIFEST
from trainer.checkpoint.reader import BAND_BYTES, Checkpoint

MB = 10**6
STEMS = ("model", "adapter_model")  # of safetensors files: a model's, a peft adapter's
NAMED = re.compile(r"checkpoint-(\d+)(" + re.escape(INCOMPLETE) + r"|\.damaged-\d+)?")


@dataclass(frozen=True)
class Tensors:
    """What checkpoints and models have in common. A checkpoint's moments are called `exp_avg/<name>` and
    `exp_avg_sq/<name>`."""

    shapes: dict[str, tuple[int, ...]]
    dtype: Callable[[str], torch.dtype]
    stream: Callable[
        [str], Iterator[torch.Tensor]
    ]  # in bands of rows, the same ones for all of the same shape
    settings: dict[str, object]


def open_model(path: Path, stem: str) -> Tensors:
    files = SafetensorsFiles(path, stem)

    def stream(name):
        shape = files.shapes[name]
        for first, last in bands(shape or (1,), 4, BAND_BYTES):
            yield files.read(
                name, (slice(first, last), *(slice(0, size) for size in shape[1:]))[: len(shape)]
            )

    found = [
        read_json(path / name) for name in ("config.json", "adapter_config.json") if (path / name).is_file()
    ]
    return Tensors(
        files.shapes,
        files.dtype,
        stream,
        {key: value for each in found for key, value in flatten(each).items()},
    )


def open_directory(path: Path) -> tuple[Checkpoint | None, Tensors]:
    """What `path` holds; the first is None for a model. Raises ValueError where it is neither, or damaged."""
    stems = [
        stem
        for stem in STEMS
        if any((path / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
    ]
    if stems:
        return None, open_model(path, stems[0])
    if not (path / MANIFEST).is_file() and not NAMED.fullmatch(path.resolve().name):
        raise ValueError(f"{path} is neither a checkpoint nor a model in safetensors")
    checkpoint = Checkpoint(path)
    stored = {key.removeprefix("parameter/"): each for key, each in checkpoint.tensors.items()}
    settings = {
        key: value
        for key, value in checkpoint.manifest.items()
        if key not in ("checksum", "files", "tensors")
    }
    return checkpoint, Tensors(
        {name: each.shape for name, each in stored.items()},
        lambda name: torch.float32,
        lambda name: stored[name].stream(),
        flatten(settings),
    )


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} of {"a": {"b": value}}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def grouped(names: Iterable[str], alike: Callable[[str], Hashable]) -> dict[str, list[str]]:
    """Names that differ in the number of their layer alone and are `alike`, under one label: layers.{0..3}.w,
    layers.{0,2}.w."""
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


def write_table(header: tuple[str, ...], rows: list[tuple]) -> None:
    """Columns as wide as they need. The header says by < or > to which side each stands."""
    lines = [[title[1:] for title in header], *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(
                f"{text:{title[0]}{width}}" for text, title, width in zip(line, header, widths, strict=True)
            ).rstrip()
        )


def write_layout(tensors: Tensors, name: str) -> tuple[str, str]:
    return " x ".join(map(str, tensors.shapes[name])) or "scalar", str(tensors.dtype(name)).removeprefix(
        "torch."
    )


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def find_damage(checkpoint: Checkpoint) -> dict[str, str]:
    """What is wrong, by `<kind>/<name>`, with each tensor whose bytes are not those that were saved. Reads
    everything."""

    def problem(stored):
        try:
            return stored.problem()
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stored = checkpoint.tensors
        return {
            key: found for key, found in zip(stored, pool.map(problem, stored.values()), strict=True) if found
        }


def show_checkpoint(checkpoint: Checkpoint) -> int:
    """Print a summary and a table; returns the exit status."""
    manifest, tensors, damage = checkpoint.manifest, checkpoint.manifest["tensors"], find_damage(checkpoint)
    sizes = {key: 4 * torch.Size(values["global_shape"]).numel() for key, values in tensors.items()}
    stages = manifest.get("pipeline_parallel_size", 1)  # those of older checkpoints do not say
    most = max(len(slices) for values in tensors.values() for slices in values["slices"])
    identity, loss, sums = (
        manifest["identity"],
        manifest["eval_loss"],
        {"all": directory_bytes(checkpoint.path)},
    )
    sums |= {kind: sum(size for key, size in sizes.items() if key.startswith(f"{kind}/")) for kind in KINDS}
    for label, value in {
        "checkpoint": checkpoint.path,
        "base model": manifest["model"],
        "its hash": identity.get("base"),
        "position": f"step {checkpoint.step}, epoch {checkpoint.position.epoch}, row {checkpoint.position.row}",
        "evaluation loss": "none" if loss is None else f"{loss:.6g}",
        "ranks": "{world_size}: {tensor_parallel_size} tensor x {data_parallel_size} data parallel{stages}".format_map(
            manifest | {"stages": f" x {stages} pipeline stages" if stages > 1 else ""}
        ),
        "ZeRO-1": f"yes, up to {most} pieces a slice" if most > 1 else "no, one piece a slice",
        "trained": "LoRA: " + str(identity["lora"])[1:-1].replace("'", "")
        if identity["lora"]
        else "all weights",
        "MB": ", ".join(f"{kind} {size / MB:,.2f}" for kind, size in sums.items()),
    }.items():
        print(f"{label:<16} {value}")
    print()

    def layout(name):
        values = tensors[f"parameter/{name}"]
        return (
            " x ".join(map(str, values["global_shape"])),
            "-" if values["dim"] is None else values["dim"],
            values["parts"],
            values["replicas"],
            sum(map(len, values["slices"])),
        )

    rows = []
    for label, names in grouped(checkpoint.shapes, layout).items():
        keys = [f"{kind}/{name}" for kind in KINDS for name in names]
        held = f"{bad} of {len(keys)} damaged" if (bad := sum(key in damage for key in keys)) else "hold"
        rows.append((label, *layout(names[0]), f"{sum(sizes[key] for key in keys) / MB:,.2f}", held))
    write_table(
        (
            "<parameter, with its moments",
            "<shape",
            ">dim",
            ">parts",
            ">replicas",
            ">pieces",
            ">MB",
            "<checksums",
        ),
        rows,
    )
    print("".join(f"{problem}\n" for problem in damage.values()), end="")
    return int(bool(damage))


def show_model(path: Path, tensors: Tensors) -> int:
    sizes = {
        name: torch.Size(shape).numel() * tensors.dtype(name).itemsize
        for name, shape in tensors.shapes.items()
    }
    print(f"{path}: {len(sizes)} tensors, {sum(sizes.values()) / MB:,.2f} MB\n")
    rows = [
        (label, *write_layout(tensors, names[0]), f"{sum(sizes[name] for name in names) / MB:,.2f}")
        for label, names in grouped(sizes, lambda name: write_layout(tensors, name)).items()
    ]
    write_table(("<tensor", "<shape", "<dtype", ">MB"), rows)
    return 0


def show_output(paths: list[Path]) -> int:
    """Print a line a checkpoint; returns the exit status: 1 where one that bears a checkpoint's name is
    damaged."""
    rows, status = [], 0
    for path in paths:
        suffix, loss, state = (
            NAMED.fullmatch(path.name)[2],
            None,
            "incomplete: being written or deleted, or its run was killed",
        )
        if suffix != INCOMPLETE:
            try:
                checkpoint = Checkpoint(path)
                loss, damage = checkpoint.manifest["eval_loss"], list(find_damage(checkpoint).values())
            except (ValueError, OSError) as error:
                damage = [str(error)]
            more = f" (and {len(damage) - 1} more tensors)" if len(damage) > 1 else ""
            state = f"damaged: {damage[0]}{more}" if damage else "complete"
            status |= bool(damage) and not suffix
        rows.append(
            (path.name, "-" if loss is None else f"{loss:.6g}", f"{directory_bytes(path) / MB:,.2f}", state)
        )
    write_table(("<checkpoint", ">eval loss", ">MB", "<state"), rows)
    return status


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
        equal, squares, largest = (
            False,
            squares + float(apart.square().sum()),
            worst(largest, float(apart.max())),
        )
    return equal, largest, math.sqrt(squares / norm) if norm else math.inf if squares else 0.0


def worst(*values: float) -> float:
    """The largest; not-a-number is worse than any."""
    return max(values, key=lambda value: (math.isnan(value), value))


def show_differences(a: Tensors, b: Tensors, paths: tuple[Path, Path]) -> int:
    """Print in what two differ; returns the exit status."""
    keys = [
        key
        for key in dict.fromkeys([*a.settings, *b.settings])
        if a.settings.get(key, a) != b.settings.get(key, b)
    ]
    rows = [
        (key, *(json.dumps(each.settings[key]) if key in each.settings else "-" for each in (a, b)))
        for key in keys
    ]
    write_table(("<setting", *(f"<{path}" for path in paths)), rows or [("all are the same", "", "")])

    def layout(name):
        holders = [(path, each) for path, each in zip(paths, (a, b), strict=True) if name in each.shapes]
        shape, dtype = zip(*(write_layout(each, name) for _, each in holders), strict=True)
        where = "both" if len(holders) > 1 else holders[0][0]
        return " and ".join(dict.fromkeys(shape)), " and ".join(dict.fromkeys(dtype)), where

    def compare(name):
        alike = name in a.shapes and a.shapes[name] == b.shapes.get(name)
        return difference(a.stream(name), b.stream(name)) if alike else (False, math.nan, math.nan)

    rows, names = [], dict.fromkeys([*a.shapes, *b.shapes])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(compare, names), strict=True))
    for label, members in grouped(names, layout).items():
        equal, *apart = zip(*(found[name] for name in members), strict=True)
        rows.append(
            (
                label,
                *layout(members[0]),
                f"{sum(equal)} of {len(equal)}",
                *(f"{worst(*each):.3g}" for each in apart),
            )
        )
    print()
    write_table(("<tensor", "<shape", "<dtype", "<in", ">equal", ">max |difference|", ">relative"), rows)
    differ = sum(not equal for equal, _, _ in found.values())
    print(
        f"\n{differ} of {len(found)} tensors differ"
        if differ
        else f"\nall {len(found)} tensors are equal to the bit"
    )
    return int(bool(differ))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "directory", type=Path, help="a checkpoint-<step>, an output directory, a model or a peft adapter"
    )
    parser.add_argument("other", type=Path, nargs="?", help="a checkpoint or a model to compare with it")
    path, other = vars(parser.parse_args(arguments)).values()
    try:
        if other:
            return show_differences(open_directory(path)[1], open_directory(other)[1], (path, other))
        if found := [each for each in path.glob("*") if NAMED.fullmatch(each.name)]:
            return show_output(
                sorted(found, key=lambda each: (int(NAMED.fullmatch(each.name)[1]), each.name))
            )
        checkpoint, tensors = open_directory(path)
        return show_checkpoint(checkpoint) if checkpoint else show_model(path, tensors)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
