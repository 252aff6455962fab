"""Which layers a run is made of: ours, or neuronx-distributed's."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from parallel.runtime import devices

OLDEST = (0, 17)  # of SDK 2.28, the first with torch 2.9
WAY_OUT = "install it from AWS's package index (docs/trainium.md), or pass --parallel_layers native"


def parallel_layers(choice: str, stages: int = 1) -> ModuleType:
    """parallel.nxd or parallel.layers, which have the same names. `choice`: nxd, native, or auto (nxd on
    Neuron devices, where there is one pipeline stage).

    Raises ValueError where nxd is chosen, and cannot be: for several stages, or without a neuronx-distributed
    that can be used.
    """
    if choice == "native" or choice == "auto" and (stages > 1 or not devices.on_neuron()):
        from parallel import layers

        return layers
    if stages > 1:
        raise ValueError(
            "--parallel_layers nxd has no pipeline stages: pass auto or native, or --pipeline_parallel_size 1"
        )
    if not devices.on_neuron():
        raise ValueError(
            "--parallel_layers nxd needs the Neuron SDK and a process for each rank; on a CPU, pass "
            "native or auto"
        )
    try:
        installed = version("neuronx-distributed")
    except PackageNotFoundError:
        raise ValueError(
            f"--parallel_layers {choice}: neuronx-distributed is not installed: {WAY_OUT}"
        ) from None
    if importlib.util.find_spec("neuronx_distributed") is None:
        raise ValueError(
            f"--parallel_layers {choice}: neuronx-distributed {installed} is PyPI's placeholder, which is "
            "empty: "
            f"{WAY_OUT}"
        )
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST:
        raise ValueError(
            f"--parallel_layers {choice}: neuronx-distributed {installed} is too old, "
            f"{'.'.join(map(str, OLDEST))} or later was expected: {WAY_OUT}"
        )
    import parallel.nxd

    return parallel.nxd
