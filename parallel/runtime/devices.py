"""Which kind of device the ranks of this machine are. Call it by module (devices.on_neuron()): tests replace
it."""

import importlib.util
import os


def on_neuron() -> bool:
    """Whether ranks are NeuronCores: the Neuron SDK is installed, and PJRT_DEVICE does not say CPU."""
    return (
        importlib.util.find_spec("torch_neuronx") is not None
        and os.environ.get("PJRT_DEVICE", "NEURON") == "NEURON"
    )


def on_gpu() -> bool:
    """Whether the rank is an NVIDIA GPU: PJRT_DEVICE says GPU."""
    return os.environ.get("PJRT_DEVICE") == "GPU"


def ranks_are_processes() -> bool:
    """Whether each rank is a process of its own, and not a thread on XLA:CPU."""
    return on_neuron() or on_gpu()


def check_device() -> None:
    """Raise ValueError for a PJRT_DEVICE that is not known: it would be a CPU without a word."""
    given = os.environ.get("PJRT_DEVICE") or "CPU"
    if given not in ("CPU", "NEURON", "GPU"):
        hint = "; an NVIDIA GPU is GPU" if given == "CUDA" else ""
        raise ValueError(f"PJRT_DEVICE={given}: CPU, GPU or NEURON was expected{hint}")


def extracts_graphs() -> bool:
    """Whether neuron_parallel_compile runs this program: graphs are collected and not executed, every value
    is garbage."""
    return os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"
