"""Compiled graphs that overwrite the state that they update: its old data is gone, and nothing else is."""

from types import SimpleNamespace

import pytest

from parallel.runtime import ProcessRuntime
from tests.support.on_ranks import on_ranks

STEPS = 12
# What is planted, the steps that are traced, and what else than the step is compiled.
PLANTS = {
    "nothing": ([0, 1, 4, 9], 0),
    "a clone and an operation outside": ([0, 1, 4, 9], 1),
    "a clone inside": ([0, 1, 4, 9], 1),
    "a number that changes": ([*range(STEPS)], 0),
}


class Unwatched(SimpleNamespace):
    """What a step may change without being traced."""

    is_opaque_to_replay = True


def trained(runtime, planted, donates):
    """{"values" of all tensors after STEPS steps and of what was planted, the steps that were "traced", how
    many graphs were "compiled", whether old data was "deleted" in each step: of two tensors of the state,
    and of tensors that are none}."""
    import torch
    import torch_xla

    from parallel.graph import backend
    from parallel.graph.live import RECORDED

    switch, backend.donates = backend.donates, lambda: donates
    runtime.replay_graphs(True)
    draws = torch.Generator().manual_seed(0)
    weights, moments = (
        [torch.rand(8, 8, generator=draws).to(runtime.device) for _ in range(3)] for _ in range(2)
    )
    seen = Unwatched(step=0, traced=[], kept=[])

    def step(x, rate):
        seen.traced.append(seen.step)
        if planted == "a clone inside":
            seen.kept.append(weights[0].clone())
        if planted == "a number that changes":
            x = x * (1.5 + 0.25 * seen.step)
        for weight, moment in zip(weights, moments, strict=True):
            moment.mul_(0.9).add_(weight @ x)
            weight.sub_(rate * moment)
        return weights[0].sum(0)

    def is_deleted(data):
        return "Data Handle: Deleted" in torch_xla._XLAC._get_xla_tensor_debug_info(data)

    deleted, before = [], runtime.compilations()
    for seen.step in range(STEPS):
        x, rate = (torch.full(shape, 0.1 / (seen.step + 1)).to(runtime.device) for shape in ((8, 8), (1,)))
        if planted == "a clone and an operation outside" and seen.step in (4, 6):  # traced, and replayed
            seen.kept += [weights[0].clone(), weights[1] * 2]
        old = [data for _, data in backend.graph_inputs([weights[0], moments[2]])]
        for data in old:
            setattr(data, RECORDED, True)  # it does not count as another tensor with this data
        sums = runtime.mark_step("step", step, x, rate)
        backend.wait()
        deleted.append([is_deleted(data) for data in [*old, x, rate, sums]])
    compiled, backend.donates = runtime.compilations() - before, switch
    values = [each.cpu() for each in [*weights, *moments, sums, *seen.kept]]
    return {"values": values, "traced": seen.traced, "compiled": compiled, "deleted": deleted}


def all_ways(runtime, planted):
    process = ProcessRuntime(0, 1, runtime.device)  # as on Neuron; it finds what the thread has compiled
    donated = [trained(each, planted, donates=True) for each in (runtime, process)]
    return donated, trained(runtime, planted, donates=False)


@pytest.mark.process
@pytest.mark.parametrize("planted", PLANTS)
def test_updated_state_is_overwritten_and_nothing_else(planted, monkeypatch):
    import torch

    monkeypatch.setenv("XLA_ENABLE_PARAM_ALIASING", "1")

    [(donated, apart)] = on_ranks(all_ways, 1, planted=planted)
    traced, others = PLANTS[planted]
    assert [each["compiled"] for each in donated] == [1 + others, 0]
    assert apart["deleted"] == STEPS * [5 * [False]]
    is_cloned = planted == "a clone inside"  # then a step's graph does not overwrite what the clone has
    for each in donated:
        assert len(each["values"]) == len(apart["values"])
        assert all(map(torch.equal, each["values"], apart["values"]))
        assert each["traced"] == traced
        assert each["deleted"] == STEPS * [[not is_cloned, True, False, False, False]]
