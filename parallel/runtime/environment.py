"""Environment variables and arguments that decide how ranks start, set before torch_xla is imported."""

import os
import sys

from parallel.runtime import devices

ALIASING = "XLA_ENABLE_PARAM_ALIASING"  # whether a graph may overwrite the state that it updates


def leaves_at_once() -> bool:
    """Whether this process has nothing to do: under torchrun on a CPU, local rank 0 hosts the ranks of all
    others.

    Needs no torch: the processes that leave do so before they import anything heavy.
    """
    if devices.on_neuron() or "LOCAL_RANK" not in os.environ:
        return False
    if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        raise ValueError(
            "several nodes need Neuron devices: XLA:CPU's ranks live in one process; use one node"
        )
    return os.environ["LOCAL_RANK"] != "0"


def requested_world_size(flag: int | None) -> int:
    """The number of ranks: torchrun's WORLD_SIZE where it started us, else --world_size, else 1."""
    started = os.environ.get("WORLD_SIZE")
    if started is None:
        return flag or 1
    if flag and flag != int(started):
        raise ValueError(
            f"--world_size {flag} contradicts torchrun, which started {started} ranks: leave the flag out"
        )
    return int(started)


def use_huge_pages() -> None:
    """On XLA:CPU, start this process again with glibc's large allocations in huge pages, unless it already
    runs so.

    To be called before any slow import. A step allocates and frees hundreds of megabytes; without huge pages
    it spends a tenth of its time on page faults.
    """
    if not devices.on_neuron() and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment(world_size: int, stochastic_rounding: bool = False) -> None:
    """Set the variables that XLA:CPU needs for `world_size` virtual devices, or Neuron to round
    stochastically.

    To be called before torch_xla is imported.
    """
    if devices.on_neuron():
        if stochastic_rounding:
            os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = "1"
        return
    if stochastic_rounding:
        print(
            "warning: --stochastic_rounding needs NeuronCores. This CPU rounds to the nearest bfloat16, "
            "so updates that "
            "are small beside their weight are lost: leave the flag out here to train with fp32 master "
            "weights.",
            file=sys.stderr,
        )
    # Measured on torch_xla 2.9: with fewer threads than ranks that wait in a collective it deadlocks. With
    # donated buffers the first of several ranks' sync waits for the others; one rank only waits for its
    # device, and needs less memory.
    os.environ |= {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(world_size),
        "NPROC": str(4 * world_size),
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
