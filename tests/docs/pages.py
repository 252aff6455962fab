"""Reads the documentation: its pages, their fenced blocks, links and commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.support.on_ranks import ROOT

OURS = r"python|torchrun|markstep|make|sbatch|tools/.*"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tools").rglob("*.md")),
]


def name(path: Path) -> str:
    """A page's path in the repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block of a page; an indented block's language is empty."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], match[2]
    for match in re.finditer(r"^\n((?: {4}.*\n)+)", prose(page), re.M):
        yield "", re.sub("^    ", "", match[1], flags=re.M)


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.M | re.S)


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of each link and picture of a page."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    return re.findall(r"\[([^][]*)\]\(([^()\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the blocks of a page, without variables in front.

    Of an indented block, only the lines that begin with a program of ours. Variables that the block sets
    (FLAGS="...") are filled in. `$(...)` and what follows it are left out, as are placeholders: FLAGS,
    [optional] brackets and "...".
    """
    for language, text in blocks(page):
        if language not in ("bash", ""):
            continue
        variables = dict(re.findall(r'^(\w+)="([^"]*)"$', text, re.M))
        for line in re.sub(r"\\\n", " ", text).splitlines():
            line = re.sub(r"\$\(.*", "", line)
            for variable, value in variables.items():
                line = re.sub(rf"\${variable}\b", value, line)
            for command in line.split(" && "):
                words = words_of(command)
                if words and (language or re.fullmatch(OURS, words[0])):
                    yield words


def words_of(command: str) -> list[str]:
    """The words of a line; none where a quotation goes over several lines."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return []
    words = [word.strip("[]") for word in words if word not in ("FLAGS", "...", "$FLAGS")]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words
