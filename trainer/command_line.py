"""Command lines: flags, and the presets that hold flags in files, become an instance of a dataclass."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

PRESETS = Path(__file__).resolve().parent / "presets"

Flags = TypeVar("Flags")


def parse_flags(flags: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """An instance of the dataclass `flags`, from command line arguments (default: sys.argv).

    Fields are flags; booleans may be bare or followed by true/false. The flags of a --preset come first, so
    that those of the command line win. Exits with status 2 and one line of error for unknown flags, and
    where the dataclass raises ValueError.
    """
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(
        flags,
        prog="trainer/main.py",
        allow_abbrev=False,
        description="Train a Llama on AWS Trainium, or on virtual devices of this CPU.",
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help explains every flag\n")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", nargs="?")
    try:
        preset = preset_parser.parse_known_args(arguments)[0].preset
        values = vars(parser.parse_args((read_preset(preset) if preset else []) + arguments))
        return flags(**values)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def read_preset(name: str) -> list[str]:
    """The flags in trainer/presets/`name`.txt, or in the file `name`.

    Raises ValueError where there is neither.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.txt"))
    path = PRESETS / f"{name}.txt" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"--preset {name}: {', '.join(known)}, or a file of flags, was expected")
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)
