"""What preflight looks at on the machine: packages, devices, memory, disk, the compile cache, open files.
Pure functions."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tools.neuron_cache import cache_place
from tools.preflight.host import Machine
from trainer.config import Config

GB = 10**9
PROCESS_BYTES = GB  # of a process that has imported everything and holds no weights; 0.83 GB were measured
CACHE_BYTES, SHM_BYTES = 10 * GB, 10 * GB
OPEN_FILES = 65536  # AWS: "Too many open files when running training job"
NODE_SIZES = (
    1,
    2,
    8,
    32,
)  # AWS, of NEURON_RT_VISIBLE_CORES: collectives on trn1 take so many cores of a node
INSTALL = (
    "activate the environment of an AWS Neuron image (VENV=... for the launch scripts), or install from AWS's package "
    'index, whose address stands in the Neuron documentation under "PyTorch NeuronX setup"'
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what is so, and, unless it is as it should be, how to mend it."""

    level: Literal["error", "warning", "ok"]
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Plan:
    """The run to come: its flags, processes on each of its nodes, phase (precompile or train), and what its
    model needs.

    model_files, model_bytes: the base's safetensors, and checkpoint_bytes, or 0 where the model is a hub id
    that may not be here. bucket_bytes: of the gradients in one collective.
    """

    config: Config
    nproc: int
    nnodes: int = 1
    phase: str = "train"
    model_files: int = 0
    model_bytes: int = 0
    checkpoint_bytes: int = 0
    bucket_bytes: int = 0

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nproc * self.nnodes


def versions(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """torch and torch-xla 2.9; on Neuron, AWS's packages for it, and not PyPI's placeholders of their names."""
    wanted = {"torch": "2.9.", "torch-xla": "2.9."}
    if machine.on_neuron:
        wanted |= {"torch-neuronx": "2.9.", "neuronx-cc": "2.", "neuronx-distributed": ""}
    elif machine.device_files and machine.environment.get("PJRT_DEVICE") != "CPU":
        yield Finding(
            "error", f"there are {machine.device_files} Neuron devices, but no torch-neuronx", INSTALL
        )
    for name, start in wanted.items():
        version = machine.versions.get(name)
        if name in machine.placeholders:
            yield Finding(
                "error",
                f"{name} {version} is PyPI's placeholder, which has nothing in it",
                f"pip uninstall {name}; {INSTALL}",
            )
        elif version is None or not version.startswith(start):
            yield Finding(
                "error",
                f"{name} {version or 'is not installed'}{f'; {start}* was expected' if start else ''}",
                INSTALL if "neuron" in name else f'pip install "{name}=={start}*"',
            )
        else:
            yield Finding("ok", f"{name} {version}")
    nxd = machine.versions.get("neuronx-distributed", "").split(".")
    if machine.on_neuron and nxd[0] == "0" and nxd[1:2] and nxd[1].isdigit() and 1 < int(nxd[1]) < 17:
        yield Finding(
            "warning",
            "this neuronx-distributed is older than 0.17, with which markstep was written",
            "take SDK 2.28, 2.29 or 2.30, the last ones with PyTorch/XLA training images",
        )


def devices(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """A NeuronCore for each process, and nobody else on it; between nodes, EFA."""
    if not machine.on_neuron:
        yield Finding("ok", f"no Neuron: {plan.world} ranks are rehearsed on this CPU")
        if plan.nnodes > 1:
            yield Finding(
                "error",
                f"{plan.nnodes} nodes without Neuron devices: XLA:CPU's ranks live in one process",
                "use one node",
            )
        return
    if not machine.device_files:
        yield Finding(
            "error",
            "torch-neuronx is installed, but there is no /dev/neuron0",
            "use a Trainium instance; in a container, pass the devices (tools/launch/docker.sh); `sudo modprobe "
            "neuron` loads the driver; PJRT_DEVICE=CPU rehearses on the CPU",
        )
    elif machine.neuron_cores is None:
        yield Finding(
            "warning",
            f"neuron-ls does not tell how many cores the {machine.device_files} devices have",
            "install aws-neuronx-tools, and put /opt/aws/neuron/bin on the PATH",
        )
    elif plan.nproc > machine.neuron_cores:
        yield Finding(
            "error",
            f"{plan.nproc} processes for {machine.neuron_cores} NeuronCores",
            f"NPROC_PER_NODE={machine.neuron_cores}, or a larger instance",
        )
    else:
        yield Finding("ok", f"{machine.neuron_cores} NeuronCores for {plan.nproc} processes")
    if machine.users:
        yield Finding(
            "warning",
            f"processes {', '.join(map(str, machine.users))} have Neuron devices open, and keep their cores",
            "wait for them, or end them: a core belongs to one process",
        )
    if plan.nproc not in NODE_SIZES:
        sizes = ", ".join(map(str, NODE_SIZES))
        yield Finding(
            "warning",
            f"{plan.nproc} processes a node: collectives on trn1 take {sizes} cores",
            f"choose NPROC_PER_NODE among {sizes}",
        )
    if plan.nnodes > 1 and not machine.efa:
        yield Finding(
            "error",
            f"{plan.nnodes} nodes, and this one has no EFA interface",
            "launch trn1.32xlarge with its 8 EFA interfaces "
            '(AWS: "How to prepare trn1.32xlarge for multi-node execution")',
        )


def memory(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The host's, for all processes and their slices of the base, /dev/shm, and the disk of --output_dir."""
    processes = plan.nproc if machine.on_neuron else 1
    imports, slices = (
        processes * PROCESS_BYTES,
        plan.model_bytes * plan.nproc // plan.config.tensor_parallel_size,
    )
    what = (
        f"{machine.memory / GB:.0f} GB of memory are available; processes take {imports / GB:.0f}, "
        f"and the base's slices up to {slices / GB:.0f}"
    )
    mend = "end other programs; a larger --tensor_parallel_size holds fewer copies of the base"
    if machine.memory < imports + slices:
        yield Finding("error" if machine.memory < imports else "warning", what, mend)
    else:
        yield Finding("ok", what)
    if machine.on_neuron and machine.shm < SHM_BYTES:
        yield Finding(
            "warning",
            f"/dev/shm has {machine.shm / GB:.1f} GB; AWS starts containers with {SHM_BYTES // GB}",
            "docker run --ipc=host, as tools/launch/docker.sh does, or mount -o remount,size=... /dev/shm",
        )
    output, kept = plan.config.output_dir, plan.config.save_total_limit or 1
    free, room = machine.free_bytes(output), (kept + 1) * plan.checkpoint_bytes
    if plan.phase == "precompile":
        return
    if not machine.writable(output):
        yield Finding(
            "error", f"--output_dir {output} cannot be written to", "choose another, or change its owner"
        )
    elif free < room:
        yield Finding(
            "error",
            f"--output_dir {output} has {free / GB:.1f} GB free; {kept + 1} checkpoints of this model take "
            f"{room / GB:.1f}",
            "choose another disk, or --save_total_limit 1",
        )
    else:
        yield Finding("ok", f"--output_dir {output}: {free / GB:.0f} GB free")


def compile_cache(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Where compiled graphs go: known, writable, and seen by all nodes."""
    if not machine.on_neuron:
        return
    place, by_flag = cache_place(machine.environment)
    url = machine.environment.get("NEURON_COMPILE_CACHE_URL")
    if by_flag and url and url != place:
        yield Finding(
            "warning",
            f"--cache_dir={place} in NEURON_CC_FLAGS wins over NEURON_COMPILE_CACHE_URL={url}",
            "keep one of them",
        )
    if "--no_cache" in machine.environment.get("NEURON_CC_FLAGS", "").split():
        yield Finding(
            "warning", "--no_cache in NEURON_CC_FLAGS: every start compiles everything", "take it out"
        )
    if "://" in place:
        bucket = place.removeprefix("s3://").partition("/")[0]
        if not place.startswith("s3://") or not bucket:
            yield Finding(
                "error",
                f"the compile cache {place} is neither a directory nor of the form s3://BUCKET/PATH",
                "set NEURON_COMPILE_CACHE_URL to one of the two",
            )
        else:
            yield Finding("ok", f"compile cache {place} (its access is not checked)")
    elif not os.path.isabs(place):
        yield Finding(
            "error",
            f"the compile cache {place} is relative, so it depends on where a process is started",
            f"NEURON_COMPILE_CACHE_URL=$PWD/{place}",
        )
    elif not machine.writable(place):
        yield Finding(
            "error",
            f"the compile cache {place} cannot be written to",
            "NEURON_COMPILE_CACHE_URL=..., or change its owner",
        )
    elif plan.nnodes > 1 and place.startswith(("/var/", "/tmp/")):
        yield Finding(
            "warning",
            f"the compile cache {place} is each node's own, so each compiles for itself",
            "NEURON_COMPILE_CACHE_URL on a file system that all nodes share, or s3://BUCKET/PATH",
        )
    elif machine.free_bytes(place) < CACHE_BYTES:
        yield Finding(
            "warning",
            f"the compile cache {place} has {machine.free_bytes(place) / GB:.1f} GB free",
            "choose another disk; `python -m tools.neuron_cache list` shows what is in it",
        )
    else:
        yield Finding("ok", f"compile cache {place}")


def open_files(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """A process has the model's files open, a checkpoint's while it resumes, and sockets to the other ranks."""
    needed = plan.model_files + 2 * plan.world + 256
    if machine.open_files < needed:
        yield Finding(
            "error",
            f"a process may open {machine.open_files} files; {plan.model_files} model files and {plan.world} "
            f"ranks need {needed}",
            f"ulimit -n {OPEN_FILES}, and nofile in /etc/security/limits.conf",
        )
    elif machine.on_neuron and machine.open_files < OPEN_FILES:
        yield Finding(
            "warning",
            f"a process may open {machine.open_files} files; AWS advises {OPEN_FILES}",
            f"ulimit -n {OPEN_FILES}, and nofile in /etc/security/limits.conf",
        )
    else:
        yield Finding("ok", f"a process may open {machine.open_files} files")


CHECKS = (versions, devices, memory, compile_cache, open_files)
