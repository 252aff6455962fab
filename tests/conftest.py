"""What all tests run under, and in which order."""

import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent

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
# An example's time is that of the machine, not of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


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


class LongestFirst(LoadScopeScheduling):
    """Units of work in the order of collection, each to the next worker that is free."""

    def _split_scope(self, nodeid):
        return unit_of(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return LongestFirst(config, log)


def pytest_collection_modifyitems(config, items):
    """The longest units first, where workers share them."""
    if hasattr(config, "workerinput"):
        seconds = Counter()
        for test, duration in recorded_seconds():
            seconds[unit_of(test)] += duration
        items.sort(key=lambda item: -seconds[unit_of(item.nodeid)])


@functools.cache
def unit_of(nodeid: str) -> str:
    """What one worker runs: a test, or a file whose tests share a fixture, so that it is made once."""
    file = nodeid.split("::")[0]
    return file if 'scope="module"' in (ROOT / file).read_text() else nodeid


def recorded_seconds() -> Iterator[tuple[str, float]]:
    """(test, seconds) as `make seconds` wrote them down; short tests are not there."""
    for line in Path(__file__).with_name("seconds.txt").read_text().splitlines():
        duration, _, test = line.split(maxsplit=2)
        yield test, float(duration.removesuffix("s"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a model that a module's tests share."""
    from tests.support.models import save_llama

    directory = tmp_path_factory.mktemp("base")
    save_llama(directory)
    return directory


@pytest.fixture
def copy(base, tmp_path):
    """A copy of `base` that a test may change."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"
