"""The walls of the house: who may import whom, how large its parts are, and how the loop reads."""

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
SOURCES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
# Outside parallel/, which is there to hide it.
KNOW_TORCH_XLA = {
    "model/llama.py",
    "tools/bench_peers/peers.py",
    "tools/bench_ranks/cluster.py",
    "tools/bench_ranks/standin.py",
    "tools/bench_step/measure.py",
    "tools/bench_step/trace.py",
    "tools/graphs/tracing.py",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_dependencies_run_one_way():
    for path in SOURCES:
        allowed = ALLOWED[name(path).split("/")[0]]
        for imported in imports(path):
            top = imported.split(".")[0]
            assert top not in ALLOWED or top in allowed, f"{path} imports {imported}"
            assert imported != "trainer.main", f"{path} imports {imported}"


def test_only_collectives_issue_collectives():
    for path in SOURCES:
        if path.name != "collectives.py":
            assert not re.search(r"\bxm\.", path.read_text()), path


def test_few_files_import_torch_xla():
    found = {name(path) for path in SOURCES for each in imports(path) if each.split(".")[0] == "torch_xla"}
    assert {path for path in found if not path.startswith("parallel/")} == KNOW_TORCH_XLA


def test_private_calls_of_torch_xla_are_in_one_file():
    assert [name(path) for path in SOURCES if "_XLAC" in path.read_text()] == ["parallel/graph/backend.py"]


def test_a_room_has_at_most_20_files():
    for room in {ROOT, *(path.parent for top in (*ALLOWED, "tests") for path in (ROOT / top).rglob("*.*"))}:
        files = [path.name for path in room.iterdir() if path.suffix in (".py", ".sh", ".md")]
        assert len(files) <= 20, f"{room} has {len(files)} files"


def test_files_and_functions_are_short():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_replaced_names_stay_away():
    old = r"wishes|Passage|pass_by_spare|reads_spare|\bspare\b|\.beside\b|side_by_side|_Kept|\.dealt\("
    for path in (*SOURCES, *(ROOT / "tests").rglob("*.py")):
        found = re.search(old, path.read_text())
        assert not found or path.name == "test_structure.py", f"{path}: {found[0]}"


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
