"""Names what lives at the peak of a graph: its kind, and the module and the line of Python that made it."""

import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from parallel.graph.hlo import Graph
from tools.graphs.memory import GRADIENTS, KEPT, WEIGHTS, WORK
from tools.graphs.peak import Peak, Tensor
from tools.graphs.places import BACKWARD, FORWARD, UPDATE, Place, Places

NOWHERE = Place("", "", "")
_PHASES = ("", FORWARD, BACKWARD, UPDATE)
_PASSED_ON = ("transpose", "convert", "reshape")  # a weight is still one behind these
_OF_GRADIENTS = ("parallel/buckets.py", "parallel/gradients.py")  # lines of these, in the update


class Alive(NamedTuple):
    """Tensors that are alike: of one kind, shape and line, and of modules that differ by numbers alone.

    `module` has * for the numbers. `bytes` are those of all `count` of them.
    """

    kind: str
    module: str
    line: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    bytes: int


def name_alive(peaks: list[Peak], graphs: list[Graph], traced: list, places: Places) -> list[list[Alive]]:
    """What lives at the peak of each graph of a step beside the state, largest first."""
    all_places = [_places_of(graph, each.inputs, places) for graph, each in zip(graphs, traced, strict=True)]
    return [
        _grouped(_alive(peaks[number], number, graphs, traced, all_places)) for number in range(len(peaks))
    ]


def _places_of(graph: Graph, inputs: dict, places: Places) -> dict[str, Place]:
    """The place of each instruction.

    What has none, or no line, has that of its first operand that has one, and the latest phase of its
    operands. A product is of the layer whose weight it reads.
    """
    found: dict[str, Place] = {}
    weights: dict[str, str] = {}
    for each in graph.instructions:
        below = [found[name] for name in each.operands]
        near = next((place for place in below if place.line), NOWHERE)
        phase = max((place.phase for place in below), key=_PHASES.index, default="")
        place = places.of(each) or replace(near, phase=phase)
        if not place.line:
            place = replace(place, line=near.line)
        layers = [weights[name] for name in each.operands if name in weights]
        if each.opcode == "parameter":
            source = inputs.get(int(each.inside))
            place = NOWHERE
            if source and source.kind == WEIGHTS:
                weights[each.name] = source.name.rpartition(".")[0]
        elif not each.operands:
            place = NOWHERE
        elif layers and each.opcode in _PASSED_ON:
            weights[each.name] = layers[0]
        elif layers and each.opcode == "dot":
            place = replace(place, module=layers[0])
        found[each.name] = place
    return found


def _alive(peak: Peak, number: int, graphs, traced, all_places) -> list[tuple[str, Place, Tensor]]:
    """(kind, place, tensor) of what lives at the peak of a graph, but for the state."""
    found = []
    for tensor in peak.tensors:
        if tensor.maker.opcode != "parameter":
            place = all_places[number][tensor.maker.name]
            found.append((_kind(tensor, place, all_places[number]), place, tensor))
            continue
        source = traced[number].inputs.get(int(tensor.maker.inside))
        if source is None:
            found.append((WORK, NOWHERE, tensor))
        elif source.made:
            graph, result = source.made
            found.append((KEPT, all_places[graph][graphs[graph].root.operands[result]], tensor))
    return found


def _kind(tensor: Tensor, place: Place, places: dict[str, Place]) -> str:
    """The kind of a tensor that a graph has made."""
    read_in = {places[step.maker.name].phase for step in tensor.readers}
    if place.phase == FORWARD and (BACKWARD in read_in or tensor.output is not None):
        return KEPT
    if place.phase == BACKWARD and (UPDATE in read_in or tensor.output is not None):
        return GRADIENTS
    if place.phase == UPDATE and place.line.startswith(_OF_GRADIENTS):
        return GRADIENTS
    return WORK


def _grouped(alive: list[tuple[str, Place, Tensor]]) -> list[Alive]:
    counts, sizes = Counter(), Counter()
    for kind, place, tensor in alive:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", place.module)
        key = (kind, module, place.line, tensor.shape.dtype, tensor.shape.sizes)
        counts[key] += 1
        sizes[key] += tensor.shape.bytes
    return [Alive(*key, counts[key], size) for key, size in sizes.most_common()]
