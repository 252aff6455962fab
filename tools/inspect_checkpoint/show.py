"""Print what a checkpoint, a model or an output directory holds, and whether it is whole."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tools.inspect_checkpoint.table import MB, group_layers, print_table, shape_and_dtype
from tools.inspect_checkpoint.tensors import CHECKPOINT_NAME, Tensors
from trainer.checkpoint.names import INCOMPLETE, KINDS
from trainer.checkpoint.reader import Checkpoint


def show_checkpoint(checkpoint: Checkpoint) -> int:
    """Print a summary and a table of the tensors; returns the exit status: 1 where a checksum is wrong."""
    tensors, damage = checkpoint.manifest["tensors"], find_damage(checkpoint)
    sizes = {key: 4 * torch.Size(values["global_shape"]).numel() for key, values in tensors.items()}
    for label, value in summarise(checkpoint, sizes).items():
        print(f"{label:<16} {value}")
    print()

    def layout(name):
        values = tensors[f"parameter/{name}"]
        return (
            " x ".join(map(str, values["global_shape"])),
            "-" if values["dim"] is None else values["dim"],
            values["parts"],
            values["replicas"],
            sum(checkpoint.tensors[f"parameter/{name}"].piece_counts),
        )

    rows = []
    for label, names in group_layers(checkpoint.shapes, layout).items():
        keys = [f"{kind}/{name}" for kind in KINDS for name in names]
        held = f"{bad} of {len(keys)} damaged" if (bad := sum(key in damage for key in keys)) else "hold"
        rows.append((label, *layout(names[0]), f"{sum(sizes[key] for key in keys) / MB:,.2f}", held))
    columns = ("<shape", ">dim", ">parts", ">replicas", ">pieces", ">MB", "<checksums")
    print_table(("<parameter, with its moments", *columns), rows)
    print("".join(f"{problem}\n" for problem in damage.values()), end="")
    return int(bool(damage))


def summarise(checkpoint: Checkpoint, sizes: dict[str, int]) -> dict[str, object]:
    """{label: value} of what the manifest says of the whole checkpoint.

    `sizes`: the bytes of each tensor, by `<kind>/<name>`.
    """
    manifest, position = checkpoint.manifest, checkpoint.position
    identity, loss = manifest["identity"], manifest["eval_loss"]
    stages = manifest.get("pipeline_parallel_size", 1)  # older checkpoints do not say
    ranks = (
        f"{manifest['world_size']}: {manifest['tensor_parallel_size']} tensor "
        f"x {manifest['data_parallel_size']} data parallel"
    )
    most = max(count for stored in checkpoint.tensors.values() for count in stored.piece_counts)
    sums = {"all": directory_bytes(checkpoint.path)} | {
        kind: sum(size for key, size in sizes.items() if key.startswith(f"{kind}/")) for kind in KINDS
    }
    trained = "all weights"
    if identity["lora"]:
        trained = "LoRA: " + str(identity["lora"])[1:-1].replace("'", "")
    return {
        "checkpoint": checkpoint.path,
        "base model": manifest["model"],
        "its hash": identity.get("base"),
        "position": f"step {checkpoint.step}, epoch {position.epoch}, row {position.row}",
        "evaluation loss": "none" if loss is None else f"{loss:.6g}",
        "ranks": ranks + (f" x {stages} pipeline stages" if stages > 1 else ""),
        "ZeRO-1": f"yes, up to {most} pieces a slice" if most > 1 else "no, one piece a slice",
        "trained": trained,
        "MB": ", ".join(f"{kind} {size / MB:,.2f}" for kind, size in sums.items()),
    }


def show_model(path: Path, tensors: Tensors) -> int:
    """Print a table of a model's tensors; returns the exit status 0."""
    sizes = {
        name: torch.Size(shape).numel() * tensors.dtype(name).itemsize
        for name, shape in tensors.shapes.items()
    }
    print(f"{path}: {len(sizes)} tensors, {sum(sizes.values()) / MB:,.2f} MB\n")
    rows = [
        (label, *shape_and_dtype(tensors, names[0]), f"{sum(sizes[name] for name in names) / MB:,.2f}")
        for label, names in group_layers(sizes, lambda name: shape_and_dtype(tensors, name)).items()
    ]
    print_table(("<tensor", "<shape", "<dtype", ">MB"), rows)
    return 0


def show_output(paths: list[Path]) -> int:
    """Print a line for each checkpoint; returns the exit status.

    It is 1 where a damaged directory bears a checkpoint's name, without a suffix.
    """
    rows, status = [], 0
    for path in paths:
        suffix = CHECKPOINT_NAME.fullmatch(path.name)[2]
        loss, state = None, "incomplete: being written or deleted, or its run was killed"
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
    print_table(("<checkpoint", ">eval loss", ">MB", "<state"), rows)
    return status


def find_damage(checkpoint: Checkpoint) -> dict[str, str]:
    """{`<kind>/<name>`: what is wrong} of each tensor whose bytes are not as saved. Reads everything."""

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


def directory_bytes(path: Path) -> int:
    """The size of all files in a directory and below."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
