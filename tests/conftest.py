"""What all tests run under."""

import os

import pytest

# Most of a small run would be XLA and LLVM making fast CPU code of its graph. The graph is the same without.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Two workers that each have a thread for every core spend half of their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Said before torch_xla is imported, or it warns that it has to guess.
os.environ.setdefault("PJRT_DEVICE", "CPU")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokens are not kept in the user's cache; processes that tests start inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
