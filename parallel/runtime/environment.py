"""Environment variables and arguments that decide how ranks start, set before torch_xla is imported."""

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

from parallel.runtime import devices, gpu
from parallel.runtime.variables import take_away

ALIASING = "XLA_ENABLE_PARAM_ALIASING"  # whether a graph may overwrite the state that it updates


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets its variables, has started this process as one of several.

    Platforms (Kubeflow, SageMaker) set WORLD_SIZE and RANK for a whole machine: these alone say nothing.
    """
    return all(name in os.environ for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))


def leaves_at_once() -> bool:
    """Whether this process has nothing to do: under torchrun on a CPU, local rank 0 hosts the ranks of all
    others.

    Needs no torch: the processes that leave do so before they import anything heavy.
    """
    if devices.ranks_are_processes() or not started_by_torchrun():
        return False
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
        raise ValueError(
            "several nodes need Neuron devices: XLA:CPU's ranks live in one process; use one node"
        )
    return os.environ["LOCAL_RANK"] != "0"


def requested_world_size(flag: int | None, default: int = 1) -> int:
    """The number of ranks: torchrun's WORLD_SIZE where it started us, else the flag --world_size, else the
    default.

    Raises ValueError where the two contradict each other, where NeuronCores were not started by torchrun, and
    for more ranks than one on a GPU.
    """
    size = _requested(flag, default)
    if devices.on_gpu() and size > 1:
        raise ValueError(
            f"{size} ranks, and PJRT_DEVICE=GPU runs one rank on one GPU: start one process; PJRT_DEVICE=CPU "
            "rehearses any topology on this CPU"
        )
    return size


def _requested(flag: int | None, default: int) -> int:
    if started_by_torchrun():
        started = _integer("WORLD_SIZE")
        if flag and flag != started:
            raise ValueError(
                f"--world_size {flag} contradicts torchrun, which started {started} ranks: leave the flag out"
            )
        return started
    if devices.on_neuron():
        raise ValueError(
            "on NeuronCores each rank is a process, and torchrun starts them: torchrun --nproc_per_node=N "
            "PROGRAM FLAGS (PJRT_DEVICE=CPU runs on this CPU instead)"
        )
    size, given = flag or default, os.environ.get("WORLD_SIZE", "1")
    if given not in ("", "1", str(size)):
        print(
            f"warning: WORLD_SIZE={given} is not read, because torchrun has not started this process: the "
            f"run has {size} rank{'s' * (size > 1)}, all on this machine",
            file=sys.stderr,
        )
    return size


def _integer(name: str) -> int:
    """The value of an environment variable; raises ValueError unless it is an integer above 0."""
    value = os.environ[name]
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value} in the environment: an integer above 0 was expected")
    return int(value)


def provide_home() -> None:
    """Give a process whose user has no name or no home directory, as in containers, what libraries look for.

    torch asks for the name of the user, and the caches of Hugging Face lie in the home directory.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the user id has no entry in the passwd file; OSError from Python 3.13 on
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = _private_directory(f"markstep-home-{os.getuid()}")
        print(
            f"warning: HOME is not set, and user id {os.getuid()} has no home directory: caches go to "
            f"{os.environ['HOME']}",
            file=sys.stderr,
        )


def _private_directory(name: str) -> str:
    """A directory among the temporary files that is this user's alone: `name`, or a new one where it is
    taken."""
    directory = Path(tempfile.gettempdir()) / name
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return str(directory)
    except OSError:
        pass  # somebody else's file of that name
    return tempfile.mkdtemp(prefix=f"{name}-")


def clean_environment() -> dict[str, str]:
    """Make the environment one in which the program computes what its flags say, and its libraries load.

    To be called first of all, before torch and torch_xla are imported. Returns the variables that were taken
    away.
    """
    provide_home()
    return take_away()


def use_huge_pages() -> None:
    """On XLA:CPU, start this process again with glibc's large allocations in huge pages, unless it already
    runs so.

    To be called before any slow import. A step allocates and frees hundreds of megabytes; without huge pages
    it spends a tenth of its time on page faults.
    """
    if not devices.ranks_are_processes() and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment(world_size: int, stochastic_rounding: bool = False) -> None:
    """Set the variables that XLA:CPU needs for `world_size` virtual devices, or Neuron to round
    stochastically; on a GPU, see that a run can start.

    To be called before torch_xla is imported. Raises ValueError for a device that is not known, and for a GPU
    that cannot be used.
    """
    clean_environment()
    devices.check_device()
    if devices.on_neuron():
        # torch would print a stack in C++ where the store is lost, before our line about it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if stochastic_rounding:
            os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = "1"
        return
    if stochastic_rounding:
        print(
            f"warning: --stochastic_rounding needs NeuronCores. This {'GPU' if devices.on_gpu() else 'CPU'} "
            "rounds to the nearest bfloat16, "
            "so updates that "
            "are small beside their weight are lost: leave the flag out here to train with fp32 master "
            "weights.",
            file=sys.stderr,
        )
    if devices.on_gpu():
        gpu.check()
        return
    # Measured on torch_xla 2.9: with fewer threads than ranks that wait in a collective it deadlocks. One
    # rank waits in none, and is slower with more threads than cores. With donated buffers the first of
    # several ranks' sync waits for the others; one rank only waits for its device, and needs less memory.
    cores = len(os.sched_getaffinity(0))
    os.environ |= {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(world_size),
        "NPROC": str(cores if world_size == 1 else max(cores, 4 * world_size)),
        "XLA_THREAD_POOL_SIZE": str(4 * world_size),
        ALIASING: os.environ.get(ALIASING, "0") if world_size == 1 else "0",
    }
    # Level 3, the default, unrolls every small loop: a LoRA step took nine times as long to compile, and ran
    # no faster.
    if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=2"
        ).strip()
    # From torchrun's variables torch_xla would conclude that there are many processes, and here is one.
    for name in (
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name, None)
