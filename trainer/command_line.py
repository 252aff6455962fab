"""Command lines: flags, and the presets that hold flags in files, become an instance of a dataclass."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

PRESETS = Path(__file__).resolve().parent / "presets"

Flags = TypeVar("Flags")


def parse_flags(
    flags: type[Flags],
    arguments: Sequence[str] | None = None,
    defaults: Sequence[str] = (),
    paths: Sequence[str] = (),
) -> Flags:
    """An instance of the dataclass `flags`, from command line arguments (default: sys.argv).

    Fields are flags; booleans may be bare or followed by true/false. `defaults` are flags that come first,
    then those of a --preset, so that those of the command line win. In the fields named by `paths` a leading
    ~ is the home directory. Exits with status 2 and one line of error for unknown flags, and where the
    dataclass raises ValueError.
    """
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(
        flags,
        prog=program("trainer/main.py"),
        allow_abbrev=False,
        description="Train a Llama on AWS Trainium, on a GPU, or on virtual devices of this CPU.",
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help explains every flag\n")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", nargs="?")
    try:
        preset = preset_parser.parse_known_args(arguments)[0].preset
        preset = read_preset(expand(preset)) if preset else []
        values = vars(parser.parse_args([*defaults, *preset, *arguments]))
        for name in paths:
            value = values[name]
            values[name] = [expand(each) for each in value] if isinstance(value, list) else expand(value)
        return flags(**values)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def program(otherwise: str) -> str:
    """How a program names itself in its help: `markstep X` where that command has started it."""
    return sys.argv[0] if sys.argv[0].startswith("markstep ") else otherwise


def expand(path: str | None) -> str | None:
    """`path` with the home directory in place of a leading ~ or ~user; a shell leaves that in --flag=~/x.

    Raises ValueError where there is no such home directory.
    """
    expanded = os.path.expanduser(path) if path else path
    if expanded and expanded.startswith("~"):
        raise ValueError(
            f"{path}: no home directory is known of {path.partition('/')[0]}; ./{path} is a path of that name"
        )
    return expanded


def read_preset(name: str) -> list[str]:
    """The flags in trainer/presets/`name`.txt, or in the file `name`.

    Raises ValueError where there is neither.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.txt"))
    path = PRESETS / f"{name}.txt" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"--preset {name}: {', '.join(known)}, or a file of flags, was expected")
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)
