"""README and docs hold: links, commands, flags, names of files, the extract of the loop."""

import argparse
import importlib.util
import os
import re
import sys

import pytest

from tests.docs.pages import PAGES, anchors, blocks, commands, links, name, prose
from tests.support.on_ranks import ROOT

README = ROOT / "README.md"
# Programs that are not ours. What a page runs has to be one of them, or one that is parsed below.
OTHERS = {
    *(".", "cd", "cp", "curl", "docker", "export", "git", "ls", "mkdir", "pip", "source", "sudo", "unset"),
    *("aws", "hf", "huggingface-cli", "kubectl", "tensorboard", "wandb"),
    *("neuron-ls", "neuron-top", "neuron_parallel_compile", "neuronx-cc"),
}
TRAINER = ["python", "trainer/main.py"]
COMMANDS = {
    "train": None,
    "merge": "merge_checkpoint",
}  # of markstep, where they are not python -m tools.NAME


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for text, target in links(page):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"
        if re.fullmatch(r"test_\w+", text):
            assert f"def {text}(" in linked.read_text(), f"{target} has no {text}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_named_files_exist(page):
    folders = "trainer|model|parallel|data|tools|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)`", prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} is not there"
    for module in re.findall(r"`(?:python -m )?tools\.(?!py\b)([a-z]\w+)", prose(page)):
        assert (ROOT / "tools" / module).is_dir() or (ROOT / "tools" / f"{module}.py").is_file(), module


class Parsed(Exception):
    """Ends a tool after its command line was parsed; holds the words that are left for trainer/main.py."""


def parse_tool(monkeypatch, tool, words):
    """Let a tool parse its command line, and the trainer the rest; argparse exits where a flag is unknown."""
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse(parser, arguments=None, namespace=None):
        if parser.prog == f"python -m tools.{tool}":
            rest = parse_known(parser, arguments, namespace)[1]
            raise Parsed([*rest, *([] if arguments is None else words[len(arguments) :])], parser.epilog)
        return parse_known(parser, arguments, namespace)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [tool, *words])
        patch.setattr(os, "environ", dict(os.environ))
        folder = ROOT / "tools" / tool
        module = importlib.import_module(f"tools.{tool}" + (".__main__" if folder.is_dir() else ""))
        with pytest.raises(Parsed) as parsed:
            module.main()
    rest, epilog = parsed.value.args
    assert not rest or "trainer/main.py" in (epilog or ""), f"tools.{tool} takes no {rest}"
    return rest


def test_commands_can_be_typed(monkeypatch, capsys):
    from trainer.config import parse

    seen = 0
    for page in PAGES:
        for words in commands(page):
            try:
                flags = flags_of(monkeypatch, words)
                if flags:
                    parse(flags)
            except (SystemExit, AssertionError) as error:
                pytest.fail(f"{name(page)}: {' '.join(words)}: {error} {capsys.readouterr().err}")
            seen += flags is not None
    assert seen > 40


def flags_of(monkeypatch, words):
    """What trainer/main.py would parse of a command; None where that is no program of ours."""
    if words[0] == "torchrun":
        words = words[
            next(n for n, word in enumerate(words) if word in ("trainer/main.py", "-m", "markstep")) :
        ]
        words = words if words[0] == "markstep" else ["python", *words]
    if words[0] == "markstep" and len(words) > 1 and words[1] != "--help":
        tool = COMMANDS.get(words[1], words[1])
        words = ["python", "-m", f"tools.{tool}", *words[2:]] if tool else [*TRAINER, *words[2:]]
    if words[:2] == TRAINER:
        return words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("tools."):
        tool = words[2].removeprefix("tools.")
        assert importlib.util.find_spec(words[2]), "there is no such tool"
        return parse_tool(monkeypatch, tool, words[3:])
    if re.fullmatch(r"sbatch|tools/.*", words[0]):
        last = max(number for number, word in enumerate(words) if word.startswith("tools/"))
        assert (ROOT / words[last]).is_file(), "there is no such file"
        return words[last + 1 :]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        assert targets >= {word for word in words[1:] if re.fullmatch("[a-z]+", word)}, "no such target"
    elif words[:3] != ["python", "-m", "pytest"] and words[:2] not in (
        ["python", "-c"],
        ["markstep", "--help"],
    ):
        assert words[0] in OTHERS, "an unknown program"
    return None


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 110 for line in lines if "](" not in line and "100%" not in line)
    assert "Nothing has run on Trainium yet" in " ".join(lines[:15])


def test_the_readme_shows_the_step():
    """Its extract consists of lines of trainer/loop.py in their order, to the character."""
    loop, position = (ROOT / "trainer" / "loop.py").read_text(), {}
    [extract] = [text for language, text in blocks(README) if language == "python"]
    parts = extract.split("...\n")
    assert len(parts) > 3
    for part in parts:
        assert loop.count(part) == 1, f"trainer/loop.py has other lines than\n{part}"
        position[part] = loop.index(part)
    assert sorted(parts, key=position.get) == parts


def test_the_map_has_every_file():
    [(_, tree)] = [block for block in blocks(ROOT / "docs" / "map.md") if block[0] == "text"]
    shown, top = set(), ""
    for line in filter(None, tree.splitlines()):
        entry = line.split()[0]
        top = top if line.startswith(" ") else entry
        shown.add(entry if entry == top else top + entry)
    for entry in shown:
        assert (ROOT / entry).exists(), f"{entry} is not there"
    for package in ("trainer", "model", "parallel", "data", "tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            folders = {f"{parent}/" for parent in path.relative_to(ROOT).parents if len(parent.parts) > 1}
            assert path.stem.startswith("__") or {name(path), *folders} & shown, f"docs/map.md lacks {path}"


def test_the_flags_are_written_down():
    from tests.docs.flags_page import page

    assert (ROOT / "docs" / "flags.md").read_text() == page(), "docs/flags.md is out of date: make flags"


def test_the_keys_of_metrics_are_explained():
    """The table of docs/metrics.md has the keys that trainer/reporting/metrics.py writes."""
    from trainer.objective import SupervisedFineTuning

    source = (ROOT / "trainer" / "reporting" / "metrics.py").read_text()
    flush = source[source.index("    def flush(self)") : source.index("    def evaluation(self")]
    written = {
        *re.findall(r'^ +"(\w+)":', flush, re.M),
        *SupervisedFineTuning.FIGURES,
        SupervisedFineTuning.UNIT,
    }
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == written


def test_a_page_begins_with_a_sentence():
    """It says what the page is for: after the title, no command, table or list."""
    for page in (ROOT / "docs").rglob("*.md"):
        title, first = page.read_text().split("\n\n")[:2]
        assert title.startswith("# ") and "\n" not in title, name(page)
        assert re.match(r"[A-Z`][^|#]*[.:]", first), f"{name(page)} begins with {first[:60]!r}"
