"""The names in a checkpoint (docs/checkpoint-format.md), and the checkpoints in a directory."""

import json
import os
import re
from pathlib import Path

from model.weights.safetensors_file import checksum

FORMAT, VERSION = "markstep checkpoint", 4
READABLE = (3, VERSION)
CHUNK = (
    2**14
)  # elements of a piece that one checksum covers: what is read of a piece begins and ends with some
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"  # trainer/reference.py
INCOMPLETE = ".incomplete"  # the suffix of a directory that is being written or deleted
NAME = re.compile(r"checkpoint-(\d+)")
# What a save writes, or a merge: whatever else a directory holds is the user's.
WRITTEN = re.compile(
    r"rank-\d{5,}\.safetensors(\.partial)?|reference\.safetensors|"
    r"(adapter_)?(model|config)(-\d+-of-\d+)?\.(safetensors|json)|"
    r"model\.safetensors\.index\.json|(manifest|generation_config|prompt_format|tokenizer|tokenizer_config|"
    r"special_tokens_map|added_tokens|vocab|chat_template)\.json|tokenizer\.model|merges\.txt|"
    r"chat_template\.jinja|additional_chat_templates"
)


class NonFinite(RuntimeError):
    """A step, or a state that was to be saved, has values that are not finite."""


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
    matches = [match for name in names if (match := NAME.fullmatch(name))]
    found = sorted((int(match[1]), Path(output_dir) / match[0]) for match in matches)
    return [(step, path) for step, path in found if path.is_dir()]


def not_written(directory: Path) -> str | None:
    """What shows that a directory with the suffix INCOMPLETE is the user's, in words; None where a save or a
    merge has left it."""
    if directory.is_symlink() or not directory.is_dir():
        return "a link" if directory.is_symlink() else "a file"
    others = sorted(name for name in os.listdir(directory) if not WRITTEN.fullmatch(name))
    return f"a directory with {others[0]}" if others else None
