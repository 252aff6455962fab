"""Programs around a training run; each is run as `python -m tools.<name>`."""

import os

from parallel.runtime import on_neuron

if not on_neuron():
    os.environ.setdefault(
        "PJRT_DEVICE", "CPU"
    )  # said before torch_xla is imported, or it warns that it has to guess
