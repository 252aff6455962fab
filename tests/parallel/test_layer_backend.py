"""--parallel_layers: which module is chosen, and what is said where neuronx-distributed cannot be used."""

import sys

import pytest

from parallel import layer_backend, layers
from parallel.mesh import Group, Mesh
from parallel.runtime import devices


@pytest.fixture
def neuron(monkeypatch):
    monkeypatch.setattr(devices, "on_neuron", lambda: True)


def install(monkeypatch, directory, version, package):
    """A distribution as pip leaves it."""
    information = directory / f"neuronx_distributed-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: neuronx-distributed\nVersion: {version}\n"
    )
    (directory / package).mkdir()
    (directory / package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "neuronx_distributed", raising=False)


def test_on_a_cpu_the_layers_are_ours():
    assert layer_backend.parallel_layers("auto") is layer_backend.parallel_layers("native") is layers
    with pytest.raises(
        ValueError, match="--parallel_layers nxd needs the Neuron SDK and a process for each rank"
    ):
        layer_backend.parallel_layers("nxd")


def test_native_is_ours_on_neuron_too(neuron):
    assert layer_backend.parallel_layers("native") is layers


def test_nothing_is_installed(neuron):
    with pytest.raises(
        ValueError,
        match="--parallel_layers auto: neuronx-distributed is not installed: install it from AWS's",
    ):
        layer_backend.parallel_layers("auto")


def test_the_placeholder_of_pypi(neuron, monkeypatch, tmp_path):
    """Its package has a name that cannot be imported."""
    install(monkeypatch, tmp_path, "0.1", "neuronx-distributed")
    with pytest.raises(
        ValueError, match="neuronx-distributed 0.1 is PyPI's placeholder, which is empty: install it"
    ):
        layer_backend.parallel_layers("nxd")


@pytest.mark.parametrize("version", ["0.9.0", "0.16.25997+f431ba8e"])
def test_a_version_that_is_too_old(neuron, monkeypatch, tmp_path, version):
    install(monkeypatch, tmp_path, version, "neuronx_distributed")
    with pytest.raises(ValueError, match="is too old, 0.17 or later was expected"):
        layer_backend.parallel_layers("auto")


def test_a_version_that_will_do_is_used(neuron, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "0.18.27753+abc", "neuronx_distributed")
    monkeypatch.setitem(sys.modules, "parallel.nxd", chosen := type(sys)("parallel.nxd"))
    monkeypatch.setattr("parallel.nxd", chosen, raising=False)
    assert layer_backend.parallel_layers("auto") is chosen


def test_replicas_are_neighbours_within_the_tensor_parallel_group():
    tp = Group([[0, 2, 4, 6], [1, 3, 5, 7]], 1)
    strided = Mesh(
        2, 8, tp, Group([[0, 1], [2, 3], [4, 5], [6, 7]], 0), Group([[rank] for rank in range(8)], 0), tp
    )
    assert strided.replicas(2) == Group([[0, 2], [4, 6], [1, 3], [5, 7]], 1)
    assert Mesh.create(5, 8, 4).replicas(2) == Group([[0, 1], [2, 3], [4, 5], [6, 7]], 1)
