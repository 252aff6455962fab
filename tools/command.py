"""The command `markstep`: every program of the repository by its name, from any folder.

    markstep train --model_id ... --dataset ...
    markstep merge output/checkpoint-10 merged

`python -m tools.X` imports from the folder where the user stands, so a file tools.py or data.py there breaks
it. An installed command does not look there.
"""

import ast
import difflib
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
RENAMED = {"merge_checkpoint": "merge"}
HELP = ("-h", "--help")
BAD_COMMAND = 2


def commands() -> dict[str, tuple[str, Path]]:
    """{command: (module, the file that Python runs)}: training, then each program in tools/ by name."""
    found = {}
    for path in [*TOOLS.glob("*.py"), *TOOLS.glob("*/__main__.py")]:
        name = path.parent.name if path.name == "__main__.py" else path.stem
        if path.name == "__main__.py" or _is_program(path.read_text(encoding="utf-8")):
            found[RENAMED.get(name, name)] = (f"tools.{name}", path)
    return {"train": ("trainer.main", TOOLS.parent / "trainer" / "main.py")} | dict(sorted(found.items()))


def _is_program(text: str) -> bool:
    return '\nif __name__ == "__main__":\n' in text


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring in one line, which is read without importing the file."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).removesuffix(".")


def help_text() -> str:
    """What `markstep --help` prints: each command with a line."""
    found = commands()
    indent = max(map(len, found)) + 4
    width = max(shutil.get_terminal_size((110, 24)).columns, 2 * indent)
    lines = [
        f"  {name:<{indent - 2}}" + textwrap.shorten(summary(path), width - indent, placeholder=" ...")
        for name, (_, path) in found.items()
    ]
    return "\n".join(
        [
            "usage: markstep COMMAND FLAGS",
            "",
            *lines,
            "",
            "`markstep COMMAND --help` explains a command's flags. Several processes: torchrun "
            "--nproc_per_node=N --no-python markstep train FLAGS",
        ]
    )


def unknown(name: str) -> str:
    """The line of error for a name that is no command."""
    names = list(commands()) + list(RENAMED)
    near = difflib.get_close_matches(name.replace("-", "_"), names, cutoff=0.5)
    near = dict.fromkeys(RENAMED.get(each, each) for each in near)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"error: markstep {name}: no such command; {hint}`markstep --help` lists all"


def main(arguments: list[str] | None = None) -> int:
    """Run a command in this process, as `python -m` would. Returns 2 where there is none of that name."""
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or HELP
    if name in HELP:
        print(help_text())
        return 0
    if name not in commands():
        print(unknown(name), file=sys.stderr)
        return BAD_COMMAND
    module, _ = commands()[name]
    sys.argv = [f"markstep {name}", *flags]
    runpy.run_module(module, run_name="__main__")
    return 0
