"""preflight with PJRT_DEVICE=GPU: its packages, the GPU, and one rank."""

from dataclasses import replace

import pytest

from parallel.runtime.gpu import Gpu
from tests.tools.launching.test_preflight import GB, TRN1, plan
from tools.preflight import host as hosts
from tools.preflight.findings import findings

VERSIONS = {
    "torch": "2.9.1",
    "torch-xla": "2.9.0",
    "jax-cuda12-pjrt": "0.7.1",
    "nvidia-cuda-nvcc-cu12": "12.8.93",
}
H100 = replace(
    TRN1,
    on_neuron=False,
    on_gpu=True,
    gpu=Gpu("NVIDIA H100", 80 * GB, 79 * GB, (12, 8)),
    versions=VERSIONS,
    environment={"PJRT_DEVICE": "GPU"},
    commands=frozenset(),
    device_files=0,
    neuron_cores=None,
    efa=0,
)
ONE = {"nproc": 1, "flags": "--tensor_parallel_size 1"}


def test_a_good_machine():
    found = findings(H100, plan(**ONE))
    assert {each.level for each in found} == {"ok"}
    assert "NVIDIA H100: 79 of 80 GB free, driver of CUDA 12.8" in [each.what for each in found]


@pytest.mark.parametrize(
    "changes, planned, what",
    [
        (
            {"versions": VERSIONS | {"jax-cuda12-pjrt": "0.8.0"}},
            {},
            "jax-cuda12-pjrt 0.8.0; 0.7.1* was expected",
        ),
        ({"versions": {**VERSIONS, "nvidia-cuda-nvcc-cu12": "11.8"}}, {}, "nvidia-cuda-nvcc-cu12 11.8; 12.*"),
        ({"gpu": "there is no GPU"}, {}, "there is no GPU"),
        ({}, {"nproc": 8, "flags": ""}, "8 ranks, and PJRT_DEVICE=GPU runs one rank"),
    ],
)
def test_one_change_gives_one_finding(changes, planned, what):
    found = findings(replace(H100, **changes), plan(**ONE | planned))
    [problem] = [each for each in found if each.level != "ok"]
    assert problem.level == "error" and what in problem.what and len(problem.mend) > 10


def test_another_plugin_needs_no_packages():
    versions = {name: VERSIONS[name] for name in ("torch", "torch-xla")}
    environment = {"PJRT_DEVICE": "GPU", "PJRT_LIBRARY_PATH": "/plugin.so"}
    host = replace(H100, versions=versions, environment=environment)
    assert {each.level for each in findings(host, plan(**ONE))} == {"ok"}


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "GPU")
    monkeypatch.setenv("PJRT_LIBRARY_PATH", "/none.so")
    here = hosts.look()
    assert here.on_gpu and here.gpu.startswith("PJRT_LIBRARY_PATH=/none.so: no such file")
