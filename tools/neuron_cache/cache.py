"""The Neuron compiler's cache of compiled graphs: its directory, and the state of what is in it.

The cache has a directory for each version of the compiler, and in it one for each graph and set of compiler
flags:

    neuronxcc-2.22.12471.0+b4a00d10/MODULE_<hash of the graph>+<hash of the flags>/
        model.hlo_module.pb  compile_flags.json  model.neff  model.done     compiled
        model.log instead of model.neff                                     failed, and never tried again
        model.hlo_module.pb.lock                                            being compiled, or left by a
                                                                            killed compiler

(AWS: "Neuron Persistent Cache"; optimum-neuron, optimum/neuron/cache/AGENTS.md.)
"""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DEFAULT_LOCATION = "/var/tmp/neuron-compile-cache"


def cache_location(environment: Mapping[str, str]) -> tuple[str, bool]:
    """(directory or URL of the compile cache, whether NEURON_CC_FLAGS names it), as the SDK decides it."""
    flag = re.search(r"--cache_dir[= ](\S+)", environment.get("NEURON_CC_FLAGS", ""))
    if flag:
        return flag[1], True
    return environment.get("NEURON_COMPILE_CACHE_URL") or DEFAULT_LOCATION, False


def state_of(entry: Path) -> str:
    """The state of a MODULE_ directory: complete, failed, locked or incomplete."""
    names = {path.name for path in entry.iterdir()}
    if {"model.neff", "model.done"} <= names:
        return "complete"
    if "model.log" in names:
        return "failed"
    return "locked" if any(name.endswith(".lock") for name in names) else "incomplete"


def entries_of(cache: Path) -> dict[Path, str]:
    """{MODULE_ directory: its state} of a cache; raises ValueError where the directory is no cache."""
    if "://" in str(cache) or str(cache).startswith("s3:/"):
        raise ValueError(f"{cache} is no directory: copy it first (aws s3 sync)")
    found = {path: state_of(path) for path in sorted(cache.glob("neuronxcc-*/MODULE_*")) if path.is_dir()}
    if not found:
        raise ValueError(
            f"{cache} holds no neuronxcc-<version>/MODULE_<hash>: a Neuron compile cache was expected"
        )
    return found


def installed_compiler() -> str:
    """The cache's name of the installed compiler; raises ValueError where none is installed."""
    try:
        return f"neuronxcc-{version('neuronx-cc')}"
    except PackageNotFoundError:
        raise ValueError(
            "neuronx-cc is not installed: pack and unpack in the environment that trains"
        ) from None
