"""What all tests run under."""

import os

import pytest

# Four fifths of a small run would be LLVM optimising the CPU code of its graph. The graph is the same
# without.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Said before torch_xla is imported, or it warns that it has to guess.
os.environ.setdefault("PJRT_DEVICE", "CPU")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokens are not kept in the user's cache; processes that tests start inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
