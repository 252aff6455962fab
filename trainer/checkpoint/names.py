"""Names in a checkpoint, and the checkpoints in a directory. CHECKPOINT_FORMAT.md describes them."""

import json
import os
import re
from pathlib import Path

from model.weights.safetensors_file import checksum

FORMAT, VERSION = "markstep checkpoint", 3
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"  # ends the name of a directory that is being written, or deleted


def manifest_checksum(manifest: dict) -> str:
    """The checksum that a manifest names: of everything else in it."""
    return checksum(
        json.dumps(
            {key: value for key, value in manifest.items() if key != "checksum"}, sort_keys=True
        ).encode()
    )


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a directory, oldest first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in names)
    return sorted((int(match[1]), Path(output_dir) / match[0]) for match in matches if match)
