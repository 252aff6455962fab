"""Writes docs/flags.md: every flag of trainer/main.py by topic, with its default, its values and its help.

    python -m tests.docs.flags_page

The topics are the comments between the fields of trainer.config.Config.
"""

import ast
import dataclasses
import inspect
import types
import typing

from tests.support.on_ranks import ROOT
from trainer.config import Config

HEAD = """# Every flag of trainer/main.py

This page lists the flags by topic. `make flags` writes it from [trainer/config.py](../trainer/config.py), and
a test fails when it is out of date.

A boolean flag may stand alone (`--bf16`) or have a value (`--bf16 false`). `--preset NAME` reads flags from a
file in [trainer/presets](../trainer/presets); flags on the command line override it.
"""
VALUES = {str: "text", int: "integer", float: "number", bool: "true, false"}


def page() -> str:
    """The text of docs/flags.md."""
    lines, fields = [HEAD], {field.name: field for field in dataclasses.fields(Config)}
    types_of = typing.get_type_hints(Config)
    for topic, names in topics().items():
        lines.append(
            f"## {topic[0].upper()}{topic[1:]}\n\n| flag | default | values | meaning |\n|---|---|---|---|"
        )
        for name in names:
            cells = default_of(fields[name]), values_of(types_of[name]), fields[name].metadata["help"]
            lines.append(f"| `--{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def topics() -> dict[str, list[str]]:
    """{topic: names of its fields}, in the order of Config. Fields before the first comment are `presets`."""
    source = inspect.getsource(Config)
    lines = source.splitlines()
    found, topic, last = {}, "presets", 0
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            comments = [line.strip() for line in lines[last : node.lineno - 1] if line.startswith("    # ")]
            topic = comments[-1].removeprefix("# ") if comments else topic
            found.setdefault(topic, []).append(node.target.id)
        last = node.end_lineno
    return found


def default_of(field: dataclasses.Field) -> str:
    """The default as it is written on the command line; empty where there is none."""
    if field.default is None:
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def values_of(kind: object) -> str:
    """What may follow the flag: the choices, or the kind of value."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"one or more: {VALUES[typing.get_args(kind)[0]]}"
    return VALUES[kind]


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), encoding="utf-8")
