"""Open checkpoints and models alike: their tensors by name, and their settings."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.weights.hub import read_json
from model.weights.safetensors_file import bands
from model.weights.sources import SafetensorsFiles
from trainer.checkpoint.names import INCOMPLETE, MANIFEST
from trainer.checkpoint.reader import Checkpoint
from trainer.checkpoint.stored import BAND_BYTES

STEMS = ("model", "adapter_model")  # names of safetensors files: of a model, of a peft adapter
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(" + re.escape(INCOMPLETE) + r"|\.damaged-\d+)?")


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint and a model have in common.

    A checkpoint's moments are named `exp_avg/<name>` and `exp_avg_sq/<name>`. `stream` yields a tensor in
    bands of rows, which are the same for all tensors of one shape.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: Callable[[str], torch.dtype]
    stream: Callable[[str], Iterator[torch.Tensor]]
    settings: dict[str, object]


def open_directory(path: Path) -> tuple[Checkpoint | None, Tensors]:
    """The checkpoint in `path`, or None for a model; and its tensors.

    Raises ValueError where the directory holds neither, or is damaged.
    """
    for stem in STEMS:
        if any((path / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")):
            return None, open_model(path, stem)
    if not (path / MANIFEST).is_file() and not CHECKPOINT_NAME.fullmatch(path.resolve().name):
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


def open_model(path: Path, stem: str) -> Tensors:
    """The tensors of `<stem>.safetensors`, or of the files in its index, and the settings of the configs."""
    files = SafetensorsFiles(path, stem)

    def stream(name):
        shape = files.shapes[name]
        for first, last in bands(shape or (1,), 4, BAND_BYTES):
            part = (slice(first, last), *(slice(0, size) for size in shape[1:]))
            yield files.read(name, part[: len(shape)])  # of a scalar, no slices

    settings = {}
    for name in ("config.json", "adapter_config.json"):
        if (path / name).is_file():
            settings |= flatten(read_json(path / name))
    return Tensors(files.shapes, files.dtype, stream, settings)


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, incomplete and damaged ones included, by step."""
    found = [path for path in directory.glob("*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(CHECKPOINT_NAME.fullmatch(path.name)[1]), path.name))


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} for {"a": {"b": value}}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
