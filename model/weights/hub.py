"""Hugging Face model directories: local ones, downloads from the hub, and their JSON files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.runtime import meet

# Files of a hub model: weights, settings, the tokenizer, and its chat templates, of which
# additional_chat_templates/ has further ones.
NEEDED = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
UNNEEDED = ["consolidated*"]  # Mistral's: the same weights once more, under its own names


def in_one_line(error: Exception) -> str:
    """The first 200 characters of a library's message, without its line breaks."""
    return " ".join(str(error).split())[:200]


def why_not_loaded(error: Exception) -> str:
    """Why transformers has not loaded what lies in a directory: its message, or that this is code."""
    if "trust_remote_code" in str(error):
        return "it names code of its own (auto_map), and code that comes with a model is never run"
    return in_one_line(error)


def resolve(model_id: str, flag: str = "--model_id") -> Path:
    """The local directory of `model_id`: itself, or the hub's snapshot, which is downloaded to its cache.

    The first process of each machine downloads it for the others. Raises ValueError, which names the `flag`,
    where `model_id` is neither a directory nor a hub id.
    """
    if os.path.isdir(model_id):
        return Path(model_id)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ValueError(f"{flag} {model_id}: no such directory")
    return Path(meet().first_on_node(f"{flag} {model_id}", lambda: _download(model_id, flag)))


def _download(model_id: str, flag: str) -> str:
    """The directory of the hub's snapshot; as `resolve`."""
    from huggingface_hub import snapshot_download

    try:
        with meet().doing(f"downloads {model_id}"):
            return snapshot_download(model_id, allow_patterns=NEEDED, ignore_patterns=UNNEEDED)
    except Exception as error:  # the hub's errors share no base class
        raise ValueError(
            f"{flag} {model_id}: no directory of that name, and the hub does not give it: "
            f"{in_one_line(error)}"
        ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises ValueError where the file holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: a JSON object was expected")
    return values


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context an OSError that names no file, as a full disk's does, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
