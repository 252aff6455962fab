"""The files of model and tokenizer beside the weights: which names are known, and which may be copied."""

import os
import stat
import sys
from pathlib import Path

from model.weights.safetensors_file import checksum
from trainer.checkpoint.names import REFERENCE

KNOWN = (  # Llama's, by transformers 4 and 5, and ours
    "config.json",
    "generation_config.json",
    "prompt_format.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a directory of *.jinja


def known_files(directory: Path) -> list[str]:
    """The names of the known files in a directory, as they would be read there."""
    names = [name for name in KNOWN if os.path.lexists(directory / name)]
    return names + sorted(f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*.jinja"))


def check_listed(directory: Path, listed: dict[str, dict]) -> None:
    """Raise ValueError where a checkpoint's directory holds a known file that its manifest does not list.

    transformers would read it in place of, or beside, what was saved.
    """
    for name in known_files(directory):
        if name not in listed:
            raise ValueError(
                f"{directory / name} is not part of the checkpoint, whose manifest does not list it: move it "
                "away"
            )


def copy_known_files(directory: Path, output: Path, listed: dict[str, dict] | None = None) -> None:
    """Copy the known files, but generation_config.json, to the directory `output`.

    `listed`: the files of a checkpoint's manifest; each copy is what was saved, and other files are refused
    (check_listed). Without it, `directory` is a model's. Raises ValueError for what is no regular file. A
    link is followed within the model's directory and within the hub's cache, of which it is a part.
    """
    if listed is not None:
        check_listed(directory, listed)
        for name in listed:
            ours = name.startswith("rank-") or name == REFERENCE
            if not ours and name not in known_files(directory):
                print(
                    f"warning: {directory / name} is not copied: no model or tokenizer reads it",
                    file=sys.stderr,
                )
    for name in known_files(directory):
        if name == "generation_config.json":
            continue
        content = _read_regular(directory / name, directory, follow=listed is None)
        if listed is not None and checksum(content) != listed[name]["checksum"]:
            raise ValueError(f"{directory / name} is damaged: its checksum is not that in the manifest")
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(content)


def _read_regular(path: Path, directory: Path, follow: bool) -> bytes:
    """The contents of a regular file; raises ValueError for anything else, and for a link that leads out."""
    real = path.resolve()
    if real != directory.resolve() / path.relative_to(directory):  # the file, or its folder, is a link
        homes = [directory.resolve()]
        if homes[0].parent.name == "snapshots":  # the hub's cache: snapshots/<version>/<name> -> blobs/<hash>
            homes.append(homes[0].parent.parent / "blobs")
        if not follow or not any(real.is_relative_to(home) for home in homes):
            raise ValueError(f"{path} is a symbolic link to {real}: a regular file was expected")
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is no regular file")
        return file.read()
