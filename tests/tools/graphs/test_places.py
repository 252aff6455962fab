"""tools/graphs/places.py: where the operations of a small module are recorded, forward and backward."""

import pytest

from tests.support.on_ranks import ROOT, on_ranks


def recorded(runtime):
    """{opcode: (module, phase, the line)} of a graph in which each of these opcodes is there once."""
    import torch

    from parallel.graph import backend
    from parallel.graph.hlo import Graph
    from tools.graphs.places import Places

    class Power(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.rsqrt(x)

        @staticmethod
        def backward(ctx, grad):
            return grad / ctx.saved_tensors[0].exp()

    class Inner(torch.nn.Module):
        def forward(self, x):
            x = torch.sin(x)
            return Power.apply(x)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Inner()])
            self.weight = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.layers[0](x @ self.weight) - 3.0

    model, places = Outer().to(runtime.device), Places()
    x = torch.ones(4, 4).to(runtime.device)
    runtime.mark_step()
    with places.recording(model):
        model(x).log().sum().backward()
        new = model.weight - model.weight.grad.sqrt()
        graph = Graph(backend.hlo_text([new]))
    found = {}
    for each in graph.instructions:
        place = places.of(each)
        if place:
            file, _, number = place.line.partition(":")
            line = (ROOT / file).read_text().splitlines()[int(number) - 1].strip() if file else ""
            found.setdefault(each.opcode, []).append((place.module, place.phase, line))
    return found


@pytest.mark.process
def test_places():
    (found,) = on_ranks(recorded, 1)
    update = "new = model.weight - model.weight.grad.sqrt()"
    inner, sine, outer = "layers.0", "x = torch.sin(x)", "return self.layers[0](x @ self.weight) - 3.0"
    loss = "model(x).log().sum().backward()"
    assert found["sine"] == [(inner, "forward", sine)]
    assert found["cosine"] == [(inner, "backward", sine)]  # autograd's own, in the line of its forward
    assert found["rsqrt"] == [(inner, "forward", "return torch.rsqrt(x)")]
    assert found["exponential"] == [(inner, "backward", "return grad / ctx.saved_tensors[0].exp()")]
    assert {place for place in found["dot"] if place[1] == "backward"} == {("", "backward", outer)}
    assert found["sqrt"] == [("", "update", update)]
    assert ("", "backward", loss) in found["divide"]
