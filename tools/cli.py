"""What the command lines of the tools share: their parser, how an error is printed, how a result is saved."""

import argparse
import json
import sys
from pathlib import Path

from trainer.command_line import expand, program

FAILED = 1


def parser(tool: str, description: str, trainer_flags: bool = False) -> argparse.ArgumentParser:
    """The parser of `python -m tools.<tool>`, whose help shows the first paragraph of `description`.

    With `trainer_flags` the tool hands unknown flags to the parser of trainer/main.py, so no flag may be
    abbreviated.
    """
    epilog = "All other flags are those of trainer/main.py." if trainer_flags else None
    return argparse.ArgumentParser(
        prog=program(f"python -m tools.{tool}"),
        description=description.split("\n\n")[0],
        allow_abbrev=not trainer_flags,
        epilog=epilog,
    )


def path_text(text: str) -> str:
    """The type of a flag whose value is a path, or a name that may be one; a leading ~ is the home directory.

    Raises argparse.ArgumentTypeError where there is none.
    """
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """The type of a flag whose value is a path; see path_text."""
    return Path(path_text(text))


def fail(error: Exception | str) -> int:
    """Print an error as one line to stderr, and return the exit status of a tool that failed."""
    print(f"error: {error}", file=sys.stderr)
    return FAILED


def write_json(path: str | Path, values: object) -> None:
    """Save a tool's result as indented JSON. Where it cannot be written, the tool ends with status 1."""
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        sys.exit(fail(f"{path} cannot be written: {error.strerror}"))
