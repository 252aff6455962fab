"""The walls of the house: who may import whom, and how long the loop is."""

import ast
import re

from tests.support.on_ranks import ROOT

ALLOWED = {
    "data": {"data"},
    "parallel": {"parallel"},
    "model": {"model", "parallel"},
    "trainer": {"trainer", "model", "parallel", "data"},
    "tools": {"tools", "trainer", "model", "parallel", "data"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_dependencies_run_one_way():
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).glob("**/*.py"):
            for name in imports(path):
                top = name.split(".")[0]
                assert top not in ALLOWED or top in allowed, f"{path} imports {name}"
                assert name != "trainer.main", f"{path} imports {name}"


def test_only_collectives_issue_collectives():
    for package in ALLOWED:
        for path in (ROOT / package).glob("**/*.py"):
            if path.name != "collectives.py":
                assert not re.search(r"\bxm\.", path.read_text()), path


def test_the_loop_can_be_read():
    text = (ROOT / "trainer" / "loop.py").read_text()
    assert len(text.splitlines()) < 250
    step = text[text.index("for step in range") :]
    parts = [".backward()", "buckets.reduce(", "clip_gradients(", "optimizer.step(", "runtime.mark_step("]
    places = [step.index(part) for part in parts[:-1]]
    assert places == sorted(places) and step.index(parts[-1], places[-1])
