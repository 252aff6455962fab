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


def extracts_graphs() -> bool:
    """Whether neuron_parallel_compile runs this program: graphs are collected and not executed, every value
    is garbage."""
    return os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"
