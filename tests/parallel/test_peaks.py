"""Published peaks by the names of devices."""

import pytest

from parallel.runtime import devices, gpu, peaks


@pytest.mark.parametrize(
    "card, bf16",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_cards(card, bf16, monkeypatch):
    assert (peaks.gpu_peak(card) and peaks.gpu_peak(card).bf16) == bf16
    monkeypatch.setattr(devices, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "look", lambda: gpu.Gpu(card, 1, 1, (12, 8)))
    assert peaks.device_and_peak() == (card, peaks.gpu_peak(card))


def test_neuron_cores(monkeypatch):
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    assert peaks.neuron_peak("trn1.32xlarge") == ("NeuronCore-v2 of trn1.32xlarge", peaks.NEURONCORE_V2)
    assert peaks.neuron_peak("trn2.48xlarge")[1].bf16 == 667e12 / 4
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    assert peaks.neuron_peak("trn2.48xlarge")[1].bf16 == 667e12 / 8
    assert peaks.neuron_peak("") == ("NeuronCore", None)
    monkeypatch.setattr(devices, "on_gpu", lambda: False)
    monkeypatch.setattr(devices, "on_neuron", lambda: False)
    assert peaks.device_and_peak() == ("CPU", None)
