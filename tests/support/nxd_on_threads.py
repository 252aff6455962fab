"""The real neuronx-distributed on XLA:CPU, where a rank is a thread and the Neuron SDK is absent.

Its source is a checkout of github.com/aws-neuron/neuronx-distributed (release 2.29: version 0.18) whose
directory NXD_SOURCE names; nothing of it is changed on disk. What has to be arranged around it:

- `neuronx_distributed/__init__.py` imports its whole toolbox, so the package is entered beside it; of the two
  closed packages that the layers import, stand-ins have the names that are asked for.
- It keeps the groups of its rank in module globals. Every call of our code passes the group, so the globals
  tell no more than the size of a group, which is the same on all ranks; only while they are set, one rank has
  them at a time.
- torch.distributed has a world for each thread, as torch's own tests have it.
- Its all-reduce is issued with pin_layout=True, and other collectives without: XLA:CPU refuses the mix, and
  NeuronCores do not.
"""

import functools
import os
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = os.environ.get("NXD_SOURCE")
needs_source = pytest.mark.skipif(
    not SOURCE,
    reason="NXD_SOURCE names no checkout of neuronx-distributed, whose layers "
    "these tests run: see tests/support/nxd_on_threads.py",
)
LOCK = threading.RLock()
STORES = []


def stand_in(name: str, path: str | None = None, **content) -> ModuleType:
    """A package that has `content`; what else it has comes from the directory `path`."""
    module = sys.modules[name] = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), [path] if path else []
    vars(module).update(content)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


class _CollectivesConfig:
    """Of each rank, the pairs that a ring of its group passes on: context parallelism, which nothing here
    uses, asks for them."""

    def __init__(self, replica_groups):
        self.rank_src_tgt_pairs = {
            rank: list(zip(group, group[1:] + group[:1], strict=True))
            for group in replica_groups
            for rank in group
        }


def install() -> None:
    """Make neuronx_distributed importable, once a process, before anything imports it."""
    with LOCK:
        if "neuronx_distributed" in sys.modules:
            return
        os.environ["NXD_LOG_LEVEL"] = "error"
        import torch_xla.core.xla_model as xla_model

        package = Path(SOURCE) / "src" / "neuronx_distributed"
        assert (package / "parallel_layers").is_dir(), (
            f"NXD_SOURCE={SOURCE} is no checkout of neuronx-distributed"
        )
        stand_in("torch_neuronx")
        stand_in("torch_neuronx.utils", get_platform_target=lambda: "trn1")
        for name in ("neuronxcc", "neuronxcc.nki", "neuronxcc.nki._pre_prod_kernels"):
            stand_in(name)
        stand_in("neuronxcc.nki._pre_prod_kernels.collectives", CollectivesConfig=_CollectivesConfig)
        stand_in("neuronx_distributed", str(package))
        pinned = xla_model.all_reduce
        xla_model.all_reduce = lambda *args, pin_layout=True, **keywords: pinned(
            *args, pin_layout=False, **keywords
        )


def _make_room_for_threads() -> None:
    """Once a process: a torch.distributed for each thread, and groups that are made without executing
    anything."""
    with LOCK:
        if STORES:
            return
        import torch_xla.distributed.xla_backend  # noqa: F401
        from neuronx_distributed.parallel_layers import parallel_state
        from torch._C._distributed_c10d import HashStore, _set_thread_isolation_mode
        from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

        _install_threaded_pg()
        _set_thread_isolation_mode(True)
        STORES.append(HashStore())
        # Otherwise a graph in which all ranks meet, where only one comes at a time.
        parallel_state.initialize_model_parallel = functools.partial(
            parallel_state.initialize_model_parallel, skip_collective_init=True
        )


def join(runtime) -> ModuleType:
    """parallel.nxd on this rank, as if its thread were a process."""
    import torch.distributed

    install()
    _make_room_for_threads()
    from neuronx_distributed.parallel_layers import parallel_state

    from parallel import nxd

    torch.distributed.init_process_group(
        "xla", store=STORES[0], rank=runtime.rank, world_size=runtime.world_size
    )

    def create_mesh(rank, world_size, tensor_parallel_size, pipeline_parallel_size=1):
        runtime.barrier()
        with LOCK:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            mesh = nxd.create_mesh(rank, world_size, tensor_parallel_size, pipeline_parallel_size)
        runtime.barrier()
        return mesh

    layers = ModuleType("nxd_of_a_rank")
    vars(layers).update(
        {name: value for name, value in vars(nxd).items() if not name.startswith("__")},
        create_mesh=create_mesh,
    )
    return layers
