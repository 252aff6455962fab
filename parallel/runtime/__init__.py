"""Where ranks live: a process each on Neuron, one process on a GPU, a thread each of one process on XLA:CPU.

`launch(function, world_size)` runs `function(runtime)` on every rank. The function is the same everywhere.
What differs is here: how a rank finds its device, what a barrier is, and how a traced graph is executed
(`mark_step`).
"""

from parallel.runtime.devices import extracts_graphs, on_gpu, on_neuron
from parallel.runtime.environment import (
    clean_environment,
    leaves_at_once,
    prepare_environment,
    requested_world_size,
    use_huge_pages,
)
from parallel.runtime.launch import launch
from parallel.runtime.peers import Peers, SharedError, meet
from parallel.runtime.processes import ProcessRuntime, run_process
from parallel.runtime.progress import Progress
from parallel.runtime.rank import GraphListener, GraphMismatch, Runtime
from parallel.runtime.stalls import watch_stalls
from parallel.runtime.threads import LockstepBarrier, ThreadRuntime
from parallel.runtime.variables import asks_for_bf16
from parallel.runtime.watch import watch_job

__all__ = [
    "GraphListener",
    "GraphMismatch",
    "LockstepBarrier",
    "Peers",
    "ProcessRuntime",
    "Progress",
    "Runtime",
    "SharedError",
    "ThreadRuntime",
    "asks_for_bf16",
    "clean_environment",
    "extracts_graphs",
    "launch",
    "leaves_at_once",
    "meet",
    "on_gpu",
    "on_neuron",
    "prepare_environment",
    "requested_world_size",
    "run_process",
    "use_huge_pages",
    "watch_job",
    "watch_stalls",
]
