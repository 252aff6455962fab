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
    """Under 200 lines, with the parts of a step once each and in their order."""
    text = (ROOT / "trainer" / "loop.py").read_text()
    assert len(text.splitlines()) < 200
    step = text[text.index("for step in range") :]
    mark_steps = ['runtime.mark_step("step"', 'runtime.mark_step("micro_batch"', 'runtime.mark_step("update"']
    parts = [*mark_steps, ".backward()", "buckets.reduce(", "clip_gradients(", "optimizer.step("]
    assert [step.count(part) for part in parts] == [1] * len(parts)
    positions = [step.index(part) for part in parts]
    assert positions == sorted(positions)


def test_the_readme_shows_the_step():
    """The functions in README.md are those of trainer/loop.py, to the letter."""
    text, loop = (ROOT / "README.md").read_text(), (ROOT / "trainer" / "loop.py").read_text()
    functions = {
        node.name: ast.get_source_segment(loop, node)
        for node in ast.parse(loop).body
        if isinstance(node, ast.FunctionDef)
    }
    for name in ("train_step", "forward_backward", "update"):
        assert functions[name] in text, f"README.md shows another {name} than trainer/loop.py has"
