"""Checks that a manifest says nothing that its files cannot hold: every number, every name, every path.

Its checksum finds damage, not forgery, so a reader must not trust what it says.
"""

import json
import math
from collections.abc import Callable

from model.lora import LoraConfig
from model.weights.safetensors_file import TensorFile
from trainer.checkpoint.names import KINDS

SHOWN = 60  # characters of a wrong value in the error


def check_manifest(manifest: dict) -> None:
    """Raise ValueError, which names the field, for a manifest that no checkpoint can have.

    What the files themselves hold is compared with it when they are opened (trainer/checkpoint/pieces.py).
    """
    for name, (good, expected) in FIELDS.items():
        require(name in manifest and good(manifest[name]), name, manifest.get(name), expected)
    for name in ("epoch", "row"):
        value = manifest["position"].get(name)
        require(
            _is_integer(value) and set(manifest["position"]) == {"epoch", "row"}, f"position.{name}", value
        )
    stages = manifest.get("pipeline_parallel_size", 1)  # older checkpoints do not say
    require(_is_integer(stages, 1), "pipeline_parallel_size", stages, "an integer above 0")
    world = manifest["world_size"]
    product = stages * manifest["tensor_parallel_size"] * manifest["data_parallel_size"]
    require(product == world, "world_size", world, f"{product}, the product of the parallel sizes")
    local = manifest.get("local_datasets", [])
    good = isinstance(local, list) and all(map(_is_text, local))
    require(good, "local_datasets", local, "a list of texts")
    _check_identity(manifest["identity"])
    for name, values in manifest["files"].items():
        require(_is_file_name(name), "a name in files", name, "a path within the checkpoint")
        good = (
            isinstance(values, dict) and _is_integer(values.get("bytes")) and _is_text(values.get("checksum"))
        )
        require(good, f"files.{name}", values, "bytes and checksum")
    _check_tensors(manifest["tensors"], manifest["files"])


def described_pieces(file: TensorFile) -> dict[str, dict]:
    """{key: what a rank's file says of the piece that the rank held}; raises ValueError where that is
    nothing."""
    try:
        described = json.loads(file.metadata["shards"])
    except (KeyError, ValueError, RecursionError):
        described = None
    if not isinstance(described, dict) or not all(isinstance(each, dict) for each in described.values()):
        raise ValueError(f"{file.path} is damaged: it does not describe what it holds")
    return described


def require(good: bool, name: str, value, expected: str = "an integer, 0 or more,") -> None:
    """Raise ValueError unless `good`, for the field `name` of this value."""
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
        raise ValueError(f"{name[:SHOWN]!r} is {shown}; {expected} was expected")


def _check_identity(identity: dict) -> None:
    """The run's identity: texts and numbers, and the settings of LoRA or None."""
    for name, value in identity.items():
        if name != "lora":
            require(
                value is None or _is_integer(value) or _is_text(value), f"identity.{name}", value, "a text"
            )
    lora = identity.get("lora", "none")
    require(lora is None or isinstance(lora, dict), "identity.lora", lora, "an object or null")
    if lora is None:
        return
    try:
        config = LoraConfig(**lora)
    except TypeError:
        raise ValueError(
            f"'identity.lora' has {', '.join(map(str, lora))[:SHOWN]}: not LoRA's settings"
        ) from None
    targets = config.target_modules
    for name, good in (
        ("r", _is_integer(config.r, 1)),
        ("lora_alpha", _is_number(config.lora_alpha) and config.lora_alpha > 0),
        ("lora_dropout", _is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1),
        ("target_modules", isinstance(targets, list) and targets and all(map(_is_text, targets))),
        ("use_rslora", isinstance(config.use_rslora, bool)),
    ):
        require(good, f"identity.lora.{name}", lora.get(name), "a value that LoRA can have")


def _check_tensors(tensors: dict, files: dict) -> None:
    """Each tensor has its shape, is cut into parts that cover it, and has its moments beside it."""
    require(bool(tensors), "tensors", tensors, "a tensor")
    most = sum(values["bytes"] for values in files.values()) // 4
    shapes = {kind: {} for kind in KINDS}
    for key, values in tensors.items():
        kind, _, name = key.partition("/")
        require(kind in KINDS and _is_text(name), "a key in tensors", key, "one of " + "/..., ".join(KINDS))
        require(isinstance(values, dict), key, values, "an object")
        shape, dim, parts = (values.get(field) for field in ("global_shape", "dim", "parts"))
        good = isinstance(shape, list) and all(_is_integer(size, 1) for size in shape)
        require(
            good and math.prod(shape) <= most, f"{key}.global_shape", shape, "sizes that the files can hold"
        )
        cut = dim is None and parts == 1 or _is_integer(dim) and dim < len(shape)
        require(
            cut and "dim" in values,
            f"{key}.dim",
            dim,
            "one of its dimensions, or null where there is one part,",
        )
        good = _is_integer(parts, 1) and _is_integer(values.get("replicas"), 1)
        require(good, f"{key}.parts", parts, "an integer above 0, with replicas above 0,")
        require(values.get("dtype") == "F32", f"{key}.dtype", values.get("dtype"), "'F32'")
        _check_places(key, values, len(files))
        shapes[kind][name] = shape
    parameters = shapes[KINDS[0]]
    for kind in KINDS[1:]:
        for name in parameters | shapes[kind]:
            here, there = shapes[kind].get(name), parameters.get(name)
            require(here == there, f"{kind}/{name}", here, f"the parameter's shape, {there},")


def _check_places(key: str, values: dict, most: int) -> None:
    """Each slice says which files have its pieces; that they have them is compared when they are opened.

    most: the number of files.
    """
    parts, slices, ranks = values["parts"], values.get("slices"), values.get("ranks")
    if "slices" in values:  # version 3
        good = isinstance(slices, list) and len(slices) == parts and all(map(_is_slice, slices))
        require(good, f"{key}.slices", slices, f"{parts} lists of pieces (first, checksum, file)")
        return
    require(_is_integer(values.get("piece"), 1), f"{key}.piece", values.get("piece"), "an integer above 0")
    good = isinstance(ranks, list) and len(ranks) == parts and all(_is_runs(runs, most) for runs in ranks)
    require(good, f"{key}.ranks", ranks, f"{parts} lists of [start, stop, step] of ranks that have files")


def _is_slice(pieces) -> bool:
    """Whether this is a list of pieces."""
    return isinstance(pieces, list) and all(
        isinstance(piece, dict)
        and _is_integer(piece.get("first"))
        and _is_text(piece.get("checksum"))
        and _is_text(piece.get("file"))
        for piece in pieces
    )


def _is_runs(runs, most: int) -> bool:
    """Whether these are arguments of Python's range, which make at most so many ranks."""
    return (
        isinstance(runs, list)
        and all(
            isinstance(run, list) and len(run) == 3 and all(map(_is_integer, run)) and run[2] for run in runs
        )
        and sum(len(range(*run)) for run in runs) <= most
    )


def _is_file_name(name: str) -> bool:
    """Whether a path stays within its directory."""
    return _is_text(name) and not set(name.split("/")) & {"", ".", ".."}


def _is_text(value) -> bool:
    """Whether this is a text of one line, which can be printed."""
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_integer(value, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


NATURAL = (_is_integer, "an integer, 0 or more,")
POSITIVE = (lambda value: _is_integer(value, 1), "an integer above 0")
OBJECT = (lambda value: isinstance(value, dict), "an object")
FIELDS: dict[str, tuple[Callable, str]] = {
    "step": NATURAL,
    "position": OBJECT,
    "eval_loss": (lambda value: value is None or _is_number(value), "a number or null"),
    "world_size": POSITIVE,
    "tensor_parallel_size": POSITIVE,
    "data_parallel_size": POSITIVE,
    "identity": OBJECT,
    "model": (_is_text, "a directory or a hub id"),
    "random_seed": (lambda value: value is None or _is_integer(value), "an integer or null"),
    "config": OBJECT,
    "files": OBJECT,
    "tensors": OBJECT,
}
