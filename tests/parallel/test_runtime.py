import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from parallel.runtime import (
    LockstepBarrier,
    ProcessRuntime,
    ThreadRuntime,
    leaves_at_once,
    requested_world_size,
)
from tests.support.on_ranks import ROOT, on_ranks


def collectives(runtime):
    """Sums and gathers over subgroups, and how often the process compiled."""
    from parallel.collectives import all_gather, all_reduce, all_reduce_max, reduce_scatter
    from parallel.mesh import Mesh

    mesh = Mesh.create(runtime.rank, runtime.world_size, 2)
    for _ in range(3):
        x = torch.tensor([float(runtime.rank), 1.0]).to(runtime.device)
        result = [
            all_reduce(x, mesh.tp),
            all_reduce_max(x, mesh.dp),
            all_gather(x, mesh.tp, 0),
            reduce_scatter(x, mesh.dp, 0),
        ]
        runtime.mark_step()
        result = [tensor.cpu().tolist() for tensor in result]
        runtime.barrier()
    return result, runtime.compilations()


@pytest.mark.process
def test_collectives_over_groups_in_one_compilation():
    for rank, (result, compilations) in enumerate(on_ranks(collectives, 4)):
        pair, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert result[0] == [sum(pair), 2]
        assert result[1] == [max(column), 1]
        assert result[2] == [pair[0], 1, pair[1], 1]
        assert result[3] == [[sum(column)], [2]][rank // 2]
        assert compilations == 1


def divergent(runtime):
    x = torch.ones(4, 4).to(runtime.device)
    y = x @ x if runtime.rank == 2 else x + x
    runtime.mark_step()
    return y.cpu()


def early(runtime):
    for _ in range(2 if runtime.rank == 1 else 3):
        x = torch.ones(4, 4).to(runtime.device) * 2
        runtime.mark_step()
    return x.cpu()


def failing(runtime):
    if runtime.rank == 1:
        raise RuntimeError("rank one has had enough")
    runtime.barrier()


@pytest.mark.process
@pytest.mark.parametrize(
    "function, message",
    [
        (divergent, "GraphMismatch: rank 2 of 4 traced another graph than rank 0"),
        (early, "GraphMismatch: rank 1 is at the end of its program while rank 0 is at a mark_step"),
        (failing, "RuntimeError: rank one has had enough"),
    ],
)
def test_one_ranks_error_ends_all_and_is_shown(function, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(function, 4)


def test_torchrun_on_a_cpu_is_hosted_by_local_rank_0(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert leaves_at_once()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not leaves_at_once()
    assert requested_world_size(None) == 8
    with pytest.raises(ValueError, match="--world_size 4 contradicts torchrun"):
        requested_world_size(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="several nodes need Neuron"):
        leaves_at_once()


@pytest.mark.process
def test_processes_that_leave_import_no_torch():
    code = (
        "import os, sys; os.environ |= {'LOCAL_RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}\n"
        "import parallel.runtime as r; assert r.leaves_at_once(); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("neuron", [False, True])
def test_stochastic_rounding_is_switched_on_or_warned_of(monkeypatch, capsys, neuron):
    from parallel import runtime

    monkeypatch.setattr(runtime.devices, "on_neuron", lambda: neuron)
    monkeypatch.setattr(os, "environ", {})
    runtime.prepare_environment(1)
    assert "NEURON_RT_STOCHASTIC_ROUNDING_EN" not in os.environ and not capsys.readouterr().err
    runtime.prepare_environment(1, stochastic_rounding=True)
    assert os.environ.get("NEURON_RT_STOCHASTIC_ROUNDING_EN") == ("1" if neuron else None)
    assert ("warning: --stochastic_rounding needs NeuronCores" in capsys.readouterr().err) is not neuron


@pytest.mark.parametrize(
    "cores, ranks, threads", [(2, 1, 2), (2, 3, 12), (1, 1, 1), (64, 1, 64), (64, 3, 64)]
)
def test_one_rank_has_a_thread_a_core_and_several_have_four_each(monkeypatch, cores, ranks, threads):
    from parallel import runtime

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    runtime.prepare_environment(ranks)
    assert os.environ["NPROC"] == str(threads)


def meet(rank, directory):
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=3
    )
    runtime = ProcessRuntime(rank, 3, None)
    for number in range(3):
        time.sleep(0.1 * ((rank + number) % 3))
        (Path(directory) / f"{number}-{rank}").touch()
        runtime.barrier()
        assert all((Path(directory) / f"{number}-{other}").exists() for other in range(3))
        assert runtime.share({"number": number} if rank == 0 else None) == {"number": number}


@pytest.mark.process
def test_processes_meet_and_share(tmp_path):
    torch.multiprocessing.start_processes(meet, (str(tmp_path),), nprocs=3, start_method="fork")


def test_threads_share_what_rank_0_has():
    barrier = LockstepBarrier(3)
    runtimes = [ThreadRuntime(rank, 3, None, barrier) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(
                lambda runtime: [runtime.share((runtime.rank, number)) for number in range(50)], runtimes
            )
        )
    assert found == [[(0, number) for number in range(50)]] * 3


def uploads_while_graphs_end(runtime):
    """(uploads of another thread, how many of them had other values than they should)."""
    import torch

    runtime.replay_graphs(False)
    uploaded, wrong, thread = 0, 0, ThreadPoolExecutor(1)

    def upload():
        tensors = [torch.randint(1, 9, (64,)) for _ in range(200)]
        return [(tensor, runtime.upload(tensor)) for tensor in tensors]

    for _ in range(100):
        future = thread.submit(upload)
        while not future.done():
            runtime.mark_step()
        for tensor, on_device in future.result():
            uploaded, wrong = uploaded + 1, wrong + (not torch.equal(on_device.cpu(), tensor))
    return uploaded, wrong


@pytest.mark.process
def test_a_thread_may_upload_while_a_graph_ends():
    assert on_ranks(uploads_while_graphs_end, 1) == [(20_000, 0)]
