"""What kinds of devices can compute at their best: published FLOP/s of dense matrix products.

NeuronCores: https://awsdocs-neuron.readthedocs-hosted.com, about-neuron/arch/neuron-hardware/trn1-arch (190
bf16 and 47.5 fp32 TFLOPS a chip of two cores) and trn2-arch (667 and 181 a chip of eight, of which two are
one rank: LNC=2, the default). GPUs: NVIDIA's data sheets, without sparsity; fp32 without tensor cores,
because products of fp32 are not rounded to TF32 here (parallel/runtime/gpu.py).
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from parallel.runtime import devices, gpu

PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # the instance type, on AWS
CORES_A_RANK = "NEURON_LOGICAL_NC_CONFIG"  # on trn2


class Peak(NamedTuple):
    """FLOP/s of one device."""

    bf16: float
    fp32: float


NEURONCORE_V2 = Peak(190e12 / 2, 47.5e12 / 2)
TWO_NEURONCORES_V3 = Peak(667e12 / 4, 181e12 / 4)
# By the driver's name of the card; the first that it contains as words.
GPUS = {
    "H200 NVL": Peak(835e12, 60e12),
    "H200": Peak(989e12, 67e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100": Peak(989e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
}


def device_and_peak() -> tuple[str, Peak | None]:
    """(the device of a rank in words, its peak); None where no peak is known, as for a CPU."""
    if devices.on_gpu():
        try:
            name = gpu.look().name
        except ValueError:
            return "GPU", None
        return name, gpu_peak(name)
    if devices.on_neuron():
        return neuron_peak(PRODUCT.read_text().strip() if PRODUCT.exists() else "")
    return "CPU", None


def gpu_peak(name: str) -> Peak | None:
    """The peak of the card; None for one that is not listed, and for a part of a card (MIG)."""
    found = [peak for card, peak in GPUS.items() if re.search(rf"\b{card}\b", name) and "MIG" not in name]
    return next(iter(found), None)


def neuron_peak(instance: str) -> tuple[str, Peak | None]:
    """(the device of a rank in words, its peak) on an instance of this type."""
    if instance.startswith(("trn1", "inf2")):
        return f"NeuronCore-v2 of {instance}", NEURONCORE_V2
    if instance.startswith("trn2"):
        cores = os.environ.get(CORES_A_RANK, "2")
        share = {"1": 0.5, "2": 1.0}.get(cores)
        peak = share and Peak(*(share * each for each in TWO_NEURONCORES_V3))
        return f"{cores} NeuronCores-v3 of {instance}", peak
    return "NeuronCore", None
