"""Environment variables and arguments that decide how ranks start, set before torch_xla is imported."""

import os
import sys

from parallel.runtime.devices import on_neuron


def leaves_at_once() -> bool:
    """Whether this process has nothing to do: under torchrun on a CPU, local rank 0 hosts the ranks of all others.

    Needs no torch: the processes that leave do so before they import anything heavy.
    """
    if on_neuron() or "LOCAL_RANK" not in os.environ:
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
    """On XLA:CPU, start this process anew with glibc's large allocations in huge pages, unless it runs so; before any import
    that is slow. A step allocates and frees hundreds of megabytes, and without them spends a tenth of its time on page faults."""
    if not on_neuron() and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment(world_size: int, stochastic_rounding: bool = False) -> None:
    """Set what XLA:CPU needs for `world_size` virtual devices, and Neuron to round at random. Before torch_xla is imported."""
    if on_neuron():
        if stochastic_rounding:
            os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = "1"
        return
    if stochastic_rounding:
        print(
            "warning: --stochastic_rounding needs NeuronCores. This CPU rounds to the nearest bfloat16, so updates that are "
            "small beside their weight are lost: leave the flag out here to train with fp32 master weights.",
            file=sys.stderr,
        )
    # Measured on torch_xla 2.9: fewer threads than ranks that wait in a collective is a deadlock, and with donated buffers the
    # first rank's sync waits for the others.
    os.environ |= {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(world_size),
        "NPROC": str(4 * world_size),
        "XLA_THREAD_POOL_SIZE": str(4 * world_size),
        "XLA_ENABLE_PARAM_ALIASING": "0",
    }
    # Level 3, the default, unrolls every small loop: it compiled a LoRA step nine times as long, which ran as fast.
    if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=2"
        ).strip()
    # torch_xla would take torchrun's variables for a world of processes, and ours is one.
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
