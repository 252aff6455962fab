"""For programs that are to take a CPU for a NeuronCore."""

import sys

import parallel.layer_backend  # noqa: F401  (the modules that ask)
import parallel.runtime  # noqa: F401


def pretend() -> None:
    """From here on, on_neuron() is True wherever it is asked."""
    for module in list(sys.modules.values()):
        if "on_neuron" in vars(module):
            module.on_neuron = lambda: True
