"""What all tests run under, and in which order."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# Most of a small run would be XLA and LLVM making fast CPU code of its graph. The graph is the same without.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Workers that each have a thread for every core spend half of their time waiting for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Said before torch_xla is imported, or it warns that it has to guess.
os.environ.setdefault("PJRT_DEVICE", "CPU")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokens are not kept in the user's cache; processes that tests start inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that starts Python has the mark `process`: `make check` leaves it out."""
    from tests.support import on_ranks

    def refuse(*_, **__):
        pytest.fail("this test starts a process: mark it with @pytest.mark.process")

    def execute(popen, command, *arguments):
        return refuse() if sys.executable in command else execute_child(popen, command, *arguments)

    execute_child = subprocess.Popen._execute_child
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("process"):
            patch.setattr(subprocess.Popen, "_execute_child", execute)
            patch.setattr(os, "fork", refuse)
            patch.setattr(on_ranks, "_forked", refuse)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist: the longest tests first, and tests that share a module's fixture on one worker."""
    if not hasattr(config, "workerinput"):
        return
    groups, seconds = {}, recorded_seconds()
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.items()
        shared = sorted(name for name, definitions in fixtures if definitions[-1].scope == "module")
        groups[item] = f"{item.path.stem}-{'-'.join(shared)}" if shared else item.nodeid
        if shared:
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    total = Counter()
    for item in items:
        total[groups[item]] += seconds[item.nodeid]
    items.sort(key=lambda item: (-total[groups[item]], groups[item]))  # stable within a group


def recorded_seconds() -> Counter:
    """{test: seconds} as `make seconds` wrote them down; 0 for short and new ones."""
    found = Counter()
    for line in Path(__file__).with_name("seconds.txt").read_text().splitlines():
        duration, test = re.fullmatch(r"\s*([\d.]+)s \w+ +(.*?)(?:@[^@\]]*)?", line).groups()
        found[test] += float(duration)
    return found
