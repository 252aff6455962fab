"""What this machine has, as far as it decides whether a run can start: looked up once, then a value."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from parallel.runtime import devices
from parallel.runtime.gpu import Gpu, check
from tools import TAKEN_AWAY

PACKAGES = (
    *("torch", "torch-xla", "torch-neuronx", "libneuronxla", "neuronx-distributed", "neuronx-cc"),
    *("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
)
SYSTEM_PACKAGES = ("aws-neuronx-dkms", "aws-neuronx-runtime-lib", "aws-neuronx-tools")
COMMANDS = ("neuron-ls", "neuron_parallel_compile")


@dataclass(frozen=True)
class Host:
    """One machine as a value, so that every check of it is a pure function.

    on_neuron: whether ranks would be NeuronCores. versions: of the installed PACKAGES; placeholders: which of
    these are PyPI's empty packages of AWS's names. commands: those of COMMANDS on the PATH. device_files: the
    number of /dev/neuron<n>; neuron_cores: the number of their cores by neuron-ls, or None; users: ids of the
    processes that have a Neuron device open. efa: the number of EFA interfaces. memory, shm: bytes available.
    open_files: the limit of a process. free_bytes and writable take a path, and look at the nearest of its
    parents that exists. on_gpu: whether the rank would be a GPU; gpu: what its driver says, or why a run on
    it could not start. system_packages: versions of the installed SYSTEM_PACKAGES: driver, runtime, tools.
    """

    on_neuron: bool
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    placeholders: frozenset[str]
    commands: frozenset[str]
    device_files: int
    neuron_cores: int | None
    users: tuple[int, ...]
    efa: int
    memory: int
    shm: int
    open_files: int
    free_bytes: Callable[[str], int]
    writable: Callable[[str], bool]
    on_gpu: bool = False
    gpu: Gpu | str | None = None
    system_packages: Mapping[str, str] = field(default_factory=dict)


def look() -> Host:
    """This machine."""
    found = {name: found for name in PACKAGES if (found := _distribution(name))}
    cores, users = neuron_ls()
    return Host(
        on_neuron=devices.on_neuron(),
        environment=os.environ | TAKEN_AWAY,
        versions={name: each.version for name, each in found.items()},
        placeholders=frozenset(
            name for name, each in found.items() if is_placeholder(each.metadata.get_payload())
        ),
        commands=frozenset(name for name in COMMANDS if shutil.which(name)),
        device_files=len(list(Path("/dev").glob("neuron[0-9]*"))),
        neuron_cores=cores,
        users=users,
        efa=len(list(Path("/sys/class/infiniband").glob("*"))),
        memory=available_memory(Path("/proc/meminfo").read_text()),
        shm=shutil.disk_usage("/dev/shm").free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        free_bytes=lambda path: shutil.disk_usage(existing(path)).free,
        writable=lambda path: existing(path).is_dir() and os.access(existing(path), os.W_OK | os.X_OK),
        on_gpu=devices.on_gpu(),
        gpu=look_at_gpu() if devices.on_gpu() else None,
        system_packages=system_packages(),
    )


def look_at_gpu() -> Gpu | str:
    """The GPU, or the problem that a run on it would end with at its start."""
    try:
        return check()
    except ValueError as error:
        return str(error)


def system_packages() -> dict[str, str]:
    """{name: version} of the installed SYSTEM_PACKAGES, by the package manager of Ubuntu or Amazon Linux."""
    for command, form in (("dpkg-query", "-f${Package} ${Version}\n"), ("rpm", "--qf=%{NAME} %{VERSION}\n")):
        if shutil.which(command):
            query = [command, "-W" if command == "dpkg-query" else "-q", form, *SYSTEM_PACKAGES]
            lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
            return {line.split()[0]: line.split()[1] for line in lines if len(line.split()) == 2}
    return {}


def existing(path: str) -> Path:
    """The path, or the nearest of its parents that exists."""
    absolute = Path(path).absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())


def is_placeholder(description: str | None) -> bool:
    """Whether a package's description is that of the empty packages that hold AWS's names on PyPI."""
    return "WRONG PACKAGE" in (description or "")


def available_memory(meminfo: str) -> int:
    """The available bytes, from the text of /proc/meminfo."""
    return next(
        1024 * int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable:")
    )


def neuron_ls() -> tuple[int | None, tuple[int, ...]]:
    """(NeuronCores, ids of the processes on them) by `neuron-ls --json-output`; (None, ()) where it fails."""
    try:
        done = subprocess.run(["neuron-ls", "--json-output"], capture_output=True, text=True, timeout=60)
        return read_neuron_ls(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return None, ()


def read_neuron_ls(text: str) -> tuple[int, tuple[int, ...]]:
    """(NeuronCores, ids of the processes on them) from the output of `neuron-ls --json-output`.

    Raises ValueError, KeyError or TypeError where the text is something else.
    """
    devices = json.loads(text)
    cores = sum(device["nc_count"] // (device.get("logical_neuroncore_config") or 1) for device in devices)
    users = {process["pid"] for device in devices for process in device.get("neuron_processes") or ()}
    return cores, tuple(sorted(users))


def _distribution(name: str):
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
