"""Checks of the machine: packages, devices, memory, disk, the compile cache, open files. Pure functions."""

import os
import re
from collections.abc import Iterator

from parallel.layer_backend import OLDEST
from parallel.runtime.gpu import PACKAGE, PLUGIN
from tools.neuron_cache.cache import cache_location
from tools.preflight.host import Host
from tools.preflight.plan import Finding, Plan

GB = 10**9
PROCESS_BYTES = GB  # of a process that has imported everything and has no weights yet; 0.83 GB were measured
CACHE_BYTES, SHM_BYTES = 10 * GB, 10 * GB
OPEN_FILES = 65536  # AWS: "Too many open files when running training job"
NODE_SIZES = (1, 2, 8, 32)  # cores of a node that collectives on trn1 take (AWS: NEURON_RT_VISIBLE_CORES)
INSTALL = (
    "activate the environment of an AWS Neuron image (VENV=... for the launch scripts), or install from "
    "AWS's package index, whose address stands in the Neuron documentation under "
    '"PyTorch NeuronX setup"'
)


def versions(host: Host, plan: Plan) -> Iterator[Finding]:
    """torch and torch-xla are 2.9; on Neuron, AWS's packages are installed, not PyPI's placeholders; on a
    GPU, those of the extra."""
    wanted = {"torch": "2.9.", "torch-xla": "2.9."}
    if host.on_gpu and not host.environment.get(PLUGIN):
        plugin, version = PACKAGE.split("==")
        wanted |= {plugin: version, "nvidia-cuda-nvcc-cu12": "12."}
    if host.on_neuron:
        wanted |= {"torch-neuronx": "2.9.", "neuronx-cc": "2.", "neuronx-distributed": ""}
    elif host.device_files and host.environment.get("PJRT_DEVICE") != "CPU":
        yield Finding("error", f"there are {host.device_files} Neuron devices, but no torch-neuronx", INSTALL)
        wanted |= dict.fromkeys(host.placeholders, "")
    for name, start in wanted.items():
        version = host.versions.get(name)
        if name in host.placeholders:
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
    name = "neuronx-distributed"
    installed = tuple(map(int, re.findall(r"\d+", host.versions.get(name, ""))[:2]))
    if host.on_neuron and name not in host.placeholders and installed and installed < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        yield Finding(
            "warning",
            f"this neuronx-distributed is older than {oldest}, with which markstep was written",
            "take SDK 2.28, 2.29 or 2.30, the last ones with PyTorch/XLA training images",
        )


def devices(host: Host, plan: Plan) -> Iterator[Finding]:
    """Each process has a NeuronCore of its own, and several nodes have EFA; or one has a GPU."""
    if host.on_gpu:
        yield from _gpu(host, plan)
        return
    if not host.on_neuron:
        yield Finding("ok", f"no Neuron: {plan.world} ranks are rehearsed on this CPU")
        if plan.nnodes > 1:
            yield Finding(
                "error",
                f"{plan.nnodes} nodes without Neuron devices: XLA:CPU's ranks live in one process",
                "use one node",
            )
        return
    if not host.device_files:
        yield Finding(
            "error",
            "torch-neuronx is installed, but there is no /dev/neuron0",
            "use a Trainium instance; in a container, pass the devices (tools/launch/docker.sh); "
            "`sudo modprobe neuron` loads the driver; PJRT_DEVICE=CPU rehearses on the CPU",
        )
    elif host.neuron_cores is None:
        yield Finding(
            "warning",
            f"neuron-ls does not tell how many cores the {host.device_files} devices have",
            "install aws-neuronx-tools, and put /opt/aws/neuron/bin on the PATH",
        )
    elif plan.nproc > host.neuron_cores:
        yield Finding(
            "error",
            f"{plan.nproc} processes for {host.neuron_cores} NeuronCores",
            f"NPROC_PER_NODE={host.neuron_cores}, or a larger instance",
        )
    else:
        yield Finding("ok", f"{host.neuron_cores} NeuronCores for {plan.nproc} processes")
    if host.users:
        yield Finding(
            "warning",
            f"processes {', '.join(map(str, host.users))} have Neuron devices open, and keep their cores",
            "wait for them, or end them: a core belongs to one process",
        )
    if plan.nproc not in NODE_SIZES:
        sizes = ", ".join(map(str, NODE_SIZES))
        yield Finding(
            "warning",
            f"{plan.nproc} processes a node: collectives on trn1 take {sizes} cores",
            f"choose NPROC_PER_NODE among {sizes}",
        )
    if plan.nnodes > 1 and not host.efa:
        yield Finding(
            "error",
            f"{plan.nnodes} nodes, and this one has no EFA interface",
            "launch trn1.32xlarge with its 8 EFA interfaces "
            '(AWS: "How to prepare trn1.32xlarge for multi-node execution")',
        )


def _gpu(host: Host, plan: Plan) -> Iterator[Finding]:
    """There is a GPU with a driver, a plugin and free memory, and one rank."""
    if isinstance(host.gpu, str):
        yield Finding("error", host.gpu, "what it names; PJRT_DEVICE=CPU rehearses on this CPU")
    elif host.gpu:
        cuda = ".".join(map(str, host.gpu.cuda))
        free, total = host.gpu.free / GB, host.gpu.total / GB
        yield Finding("ok", f"{host.gpu.name}: {free:.0f} of {total:.0f} GB free, driver of CUDA {cuda}")
    if plan.world > 1:
        yield Finding(
            "error",
            f"{plan.world} ranks, and PJRT_DEVICE=GPU runs one rank on one GPU",
            "--nproc_per_node 1 on one node; PJRT_DEVICE=CPU rehearses any topology on the CPU",
        )


def memory(host: Host, plan: Plan) -> Iterator[Finding]:
    """Memory holds all processes and their slices of the base, /dev/shm is large, --output_dir has room."""
    processes = plan.nproc if host.on_neuron else 1
    imports = processes * PROCESS_BYTES
    slices = plan.model_bytes * plan.nproc // plan.config.tensor_parallel_size
    what = (
        f"{host.memory / GB:.0f} GB of memory are available; processes take {imports / GB:.0f}, "
        f"and the base's slices up to {slices / GB:.0f}"
    )
    mend = "end other programs; a larger --tensor_parallel_size holds fewer copies of the base"
    if host.memory < imports + slices:
        yield Finding("error" if host.memory < imports else "warning", what, mend)
    else:
        yield Finding("ok", what)
    if host.on_neuron and host.shm < SHM_BYTES:
        yield Finding(
            "warning",
            f"/dev/shm has {host.shm / GB:.1f} GB; AWS starts containers with {SHM_BYTES // GB}",
            "docker run --ipc=host, as tools/launch/docker.sh does, or mount -o remount,size=... /dev/shm",
        )
    output, kept = plan.config.output_dir, plan.config.save_total_limit or 1
    free, room = host.free_bytes(output), (kept + 1) * plan.checkpoint_bytes
    if plan.phase == "precompile":
        return
    if not host.writable(output):
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


def compile_cache(host: Host, plan: Plan) -> Iterator[Finding]:
    """The directory or bucket of compiled graphs is known, can be written to, and is seen by all nodes."""
    if not host.on_neuron:
        return
    cache, by_flag = cache_location(host.environment)
    url = host.environment.get("NEURON_COMPILE_CACHE_URL")
    if by_flag and url and url != cache:
        yield Finding(
            "warning",
            f"--cache_dir={cache} in NEURON_CC_FLAGS wins over NEURON_COMPILE_CACHE_URL={url}",
            "keep one of them",
        )
    if "--no_cache" in host.environment.get("NEURON_CC_FLAGS", "").split():
        yield Finding(
            "warning", "--no_cache in NEURON_CC_FLAGS: every start compiles everything", "take it out"
        )
    if "://" in cache:
        bucket = cache.removeprefix("s3://").partition("/")[0]
        if not cache.startswith("s3://") or not bucket:
            yield Finding(
                "error",
                f"the compile cache {cache} is neither a directory nor of the form s3://BUCKET/PATH",
                "set NEURON_COMPILE_CACHE_URL to one of the two",
            )
        else:
            yield Finding("ok", f"compile cache {cache} (its access is not checked)")
    elif not os.path.isabs(cache):
        yield Finding(
            "error",
            f"the compile cache {cache} is relative, so it depends on where a process is started",
            f"NEURON_COMPILE_CACHE_URL=$PWD/{cache}",
        )
    elif not host.writable(cache):
        yield Finding(
            "error",
            f"the compile cache {cache} cannot be written to",
            "NEURON_COMPILE_CACHE_URL=..., or change its owner",
        )
    elif plan.nnodes > 1 and cache.startswith(("/var/", "/tmp/")):
        yield Finding(
            "warning",
            f"the compile cache {cache} is each node's own, so each compiles for itself",
            "NEURON_COMPILE_CACHE_URL on a file system that all nodes share, or s3://BUCKET/PATH",
        )
    elif host.free_bytes(cache) < CACHE_BYTES:
        yield Finding(
            "warning",
            f"the compile cache {cache} has {host.free_bytes(cache) / GB:.1f} GB free",
            "choose another disk; `python -m tools.neuron_cache list` shows what is in it",
        )
    else:
        yield Finding("ok", f"compile cache {cache}")


def open_files(host: Host, plan: Plan) -> Iterator[Finding]:
    """A process may open the model's files, those of a checkpoint, and sockets to the other ranks."""
    needed = plan.model_files + 2 * plan.world + 256
    if host.open_files < needed:
        yield Finding(
            "error",
            f"a process may open {host.open_files} files; {plan.model_files} model files and {plan.world} "
            f"ranks need {needed}",
            f"ulimit -n {OPEN_FILES}, and nofile in /etc/security/limits.conf",
        )
    elif host.on_neuron and host.open_files < OPEN_FILES:
        yield Finding(
            "warning",
            f"a process may open {host.open_files} files; AWS advises {OPEN_FILES}",
            f"ulimit -n {OPEN_FILES}, and nofile in /etc/security/limits.conf",
        )
    else:
        yield Finding("ok", f"a process may open {host.open_files} files")


CHECKS = (versions, devices, memory, compile_cache, open_files)
