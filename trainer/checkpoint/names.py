"""The names in a checkpoint, which CHECKPOINT_FORMAT.md describes, and the checkpoints in a directory."""

import json
import os
import re
from pathlib import Path

from model.weights.safetensors_file import checksum

FORMAT, VERSION = "markstep checkpoint", 3
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"  # the suffix of a directory that is being written or deleted


def manifest_checksum(manifest: dict) -> str:
    """The checksum of a manifest, which covers everything in it but the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(content, sort_keys=True).encode())


def rank_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a directory, oldest first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in names)
    return sorted((int(match[1]), Path(output_dir) / match[0]) for match in matches if match)
