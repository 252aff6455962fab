"""Stand-ins for an NVIDIA GPU: its driver, and a PJRT plugin that is called "cuda", compiled from C."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
XLA_CPU = "lammps_jax_pjrt_cpu"  # a package with XLA:CPU as a PJRT plugin, written for something else


def build(directory: Path) -> dict[str, str]:
    """Compile both into `directory`; returns the variables of a process that is to find them. Skips the test
    where no C compiler is installed."""
    if not COMPILER:
        pytest.skip("no C compiler is installed, with which the stand-ins for a GPU are made")
    for source, library in (("plugin.c", "plugin.so"), ("driver.c", "libcuda.so.1")):
        command = [COMPILER, "-shared", "-fPIC", "-o", directory / library, HERE / source, "-ldl"]
        subprocess.run(command, check=True)
    path = f"{directory}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return {
        "PJRT_DEVICE": "GPU",
        "PJRT_LIBRARY_PATH": str(directory / "plugin.so"),
        "LD_LIBRARY_PATH": path.rstrip(":"),
    }


def on_xla_cpu() -> dict[str, str]:
    """Variables with which the plugin computes, on XLA:CPU. Skips the test where none is installed."""
    package = find_spec(XLA_CPU)
    if not package:
        name = XLA_CPU.replace("_", "-")
        pytest.skip(f"XLA:CPU as a plugin is not installed: pip install --no-deps {name}==0.11.2")
    [folder] = package.submodule_search_locations
    return {"MARKSTEP_TEST_PLUGIN": str(Path(folder) / "pjrt_c_api_cpu_plugin.so")}
