"""What lives in memory while a graph runs: a model of what a compiler makes of it, and the most at once.

The rules are those of XLA:CPU, as its buffer assignment shows them (docs/benchmarks/memory.md):

- What is computed element by element, or only moves elements, is fused into what reads it, and stored
  nowhere. It is stored where a product, a reduction, a collective or the graph's result reads it, and where
  several read it and it is expensive or has several operands of its size. Reshapes and tuples are names of
  what is stored already; so are transposes that a product takes as they are.
- An operation runs as soon as its operands are there, breadth first. Nothing is delayed to save memory, but
  for what is computed again behind a barrier, which XLA:CPU takes away and other compilers keep.
- A result of the graph overwrites the input that it updates, or has memory of its own from the beginning to
  the end. As long as it is not written, another tensor may live there, also an operand that a fused operation
  turns into it.
"""

import re
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf, prod

from parallel.graph.hlo import Graph, Instruction, Shape


def _opcodes(text: str) -> frozenset[str]:
    return frozenset(text.split())


FREE = _opcodes("constant iota broadcast")  # fused into all that reads them
EXPENSIVE = _opcodes(  # fused, but computed once
    "atan2 cbrt cosine divide exponential exponential-minus-one log log-plus-one logistic power remainder "
    "rsqrt sine sqrt tan tanh"
)
CHEAP = _opcodes(
    "abs add and bitcast-convert ceil clamp compare convert floor is-finite maximum minimum multiply negate "
    "not or popcnt round-nearest-afz round-nearest-even select shift-left shift-right-arithmetic "
    "shift-right-logical sign subtract xor "
    "concatenate dynamic-slice dynamic-update-slice gather pad reverse slice transpose"
)
FUSED = FREE | EXPENSIVE | CHEAP
NAMES = _opcodes("reshape tuple get-tuple-element")
_TOKEN = Shape("pred", (0,))


@dataclass(eq=False)
class Tensor:
    """An array in memory: what made it, and the steps in which it is there, from `first` to before `end`.

    `output`: its number among the results of the graph; None where it is none.
    """

    maker: Instruction
    shape: Shape
    first: float = -inf
    end: float = -inf
    output: int | None = None
    readers: list["Step"] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Step:
    """An operation with all that is fused into it: the tensors that it reads and writes."""

    maker: Instruction
    reads: list[Tensor]
    writes: list[Tensor]


@dataclass
class Peak:
    """The moment of a graph when most lives.

    `bytes`: what lives then beside the inputs. `tensors`: all that has memory then: the inputs, the results
    but for those that overwrite inputs, and what else lives.
    """

    bytes: int
    tensors: list[Tensor]


def find_peak(graph: Graph, overwritten: dict[int, int] | None = None, keeps_barriers: bool = True) -> Peak:
    """The peak of a graph.

    `overwritten`: the number of a result -> that of the input that it updates. XLA:CPU does not keep
    barriers: what is to be computed again is, but as soon as its operands are there.
    """
    overwritten = overwritten or {}
    inputs, steps = _steps(graph, keeps_barriers)
    steps = _breadth_first(steps)
    _set_lives(steps)
    tensors = [tensor for step in steps for tensor in step.writes]
    beside, taken = 0, []  # of each result's memory: (its bytes, the times when it is taken)
    for tensor in tensors:
        if tensor.output in overwritten:
            before = inputs[overwritten[tensor.output]]
            taken.append((tensor.shape.bytes, [(-inf, before.end), (tensor.first, inf)]))
        elif tensor.output is not None:
            beside += tensor.shape.bytes
            taken.append((tensor.shape.bytes, [(tensor.first, inf)]))
    rest = _without_place(tensors, taken)
    position, most = _most(rest, len(steps))
    results = [tensor for tensor in tensors if tensor.output is not None and tensor.output not in overwritten]
    alive = [each for each in rest if each.first <= position < each.end and each.shape.bytes]
    return Peak(beside + most, [*inputs.values(), *results, *alive])


def _steps(graph: Graph, keeps_barriers: bool) -> tuple[dict[int, Tensor], list[Step]]:
    """({number of a parameter: its tensor}, the steps in the order of the text)."""
    fused, names = _fused_and_named(graph)
    inputs: dict[int, Tensor] = {}
    steps: list[Step] = []
    # For each element of an instruction's result, the tensors that one reads who reads it.
    read_for: dict[str, list[dict[Tensor, None]]] = {}
    for each in graph.instructions:
        below = [element for name in each.operands for element in read_for[name]]
        if each.opcode == "parameter":
            tensor = Tensor(each, each.shapes[0])
            inputs[int(each.inside)] = tensor
            read_for[each.name] = [{tensor: None}]
        elif each.opcode == "get-tuple-element":
            read_for[each.name] = [below[int(re.search(r"index=(\d+)", each.rest)[1])]]
        elif each.opcode == "opt-barrier" and keeps_barriers:
            token = Tensor(each, _TOKEN)
            _add_step(steps, below, [token])
            read_for[each.name] = [element | {token: None} for element in below]
        elif each.name in names or each.opcode == "opt-barrier":
            read_for[each.name] = below
        elif each.name in fused:
            read_for[each.name] = [{tensor: None for element in below for tensor in element}]
        else:
            written = [Tensor(each, shape) for shape in each.shapes]
            _add_step(steps, below, written)
            read_for[each.name] = [{tensor: None} for tensor in written]
        if each.is_root:
            for number, element in enumerate(read_for[each.name]):
                for tensor in element:
                    tensor.output = number
    return inputs, steps


def _add_step(steps: list[Step], below: list[dict[Tensor, None]], written: list[Tensor]) -> None:
    step = Step(written[0].maker, list({tensor: None for element in below for tensor in element}), written)
    for tensor in step.reads:
        tensor.readers.append(step)
    steps.append(step)


def _fused_and_named(graph: Graph) -> tuple[set[str], set[str]]:
    """The instructions that are stored nowhere, and those that name what is stored already."""
    readers: dict[str, set[str]] = {each.name: set() for each in graph.instructions}
    for each in reversed(graph.instructions):
        reads = readers[each.name] if each.opcode == "reshape" else {each.name}
        for name in each.operands:
            readers[name] |= reads
    fused, names = set(), set()
    for each in graph.instructions:
        read_by = [graph.by_name[name] for name in readers[each.name]]
        if each.opcode in NAMES or each.opcode == "transpose" and _is_folded(each, read_by, graph, fused):
            names.add(each.name)
        elif each.opcode in ("constant", "iota"):
            fused.add(each.name)
        elif each.opcode in FUSED and read_by and all(reader.opcode in FUSED for reader in read_by):
            once = len(read_by) <= 1 or each.opcode in FREE
            if once or each.opcode in CHEAP and len(_wide_operands(each, graph)) <= 1:
                fused.add(each.name)
    return fused, names


def _is_folded(transpose: Instruction, read_by: list[Instruction], graph: Graph, fused: set[str]) -> bool:
    """Whether products take what the transpose reads, which is stored, in its order: where all but the last
    two dimensions stay."""
    stay = transpose.numbers("dimensions")[:-2]
    return (
        _behind_reshapes(transpose.operands[0], graph).name not in fused
        and stay == tuple(range(len(stay)))
        and all(reader.opcode == "dot" or reader.opcode in FUSED for reader in read_by)
    )


def _wide_operands(each: Instruction, graph: Graph) -> set[str]:
    """The operands that have more than half as many elements as the result, and are in memory."""
    operands = [_behind_reshapes(name, graph) for name in each.operands]
    least = prod(each.shapes[0].sizes) / 2
    return {
        operand.name
        for operand in operands
        if operand.opcode not in FREE and prod(operand.shapes[0].sizes) > least
    }


def _behind_reshapes(name: str, graph: Graph) -> Instruction:
    """The instruction, or of reshapes what they name."""
    while graph.by_name[name].opcode == "reshape":
        name = graph.by_name[name].operands[0]
    return graph.by_name[name]


def _breadth_first(steps: list[Step]) -> list[Step]:
    """The steps in the order in which what they read is there."""
    waits = {id(step): sum(tensor.maker.opcode != "parameter" for tensor in step.reads) for step in steps}
    ready, order = deque(step for step in steps if not waits[id(step)]), []
    while ready:
        step = ready.popleft()
        order.append(step)
        for reader in (reader for tensor in step.writes for reader in tensor.readers):
            waits[id(reader)] -= 1
            if not waits[id(reader)]:
                ready.append(reader)
    return order


def _set_lives(steps: list[Step]) -> None:
    """Say of each tensor from when to when it lives, if the steps run in this order."""
    for position, step in enumerate(steps):
        for tensor in step.writes:
            tensor.first, tensor.end = position, inf if tensor.output is not None else position + 1
        for tensor in step.reads:
            tensor.end = max(tensor.end, position + 1)
    for position, step in enumerate(steps):
        if step.maker.opcode in FUSED and step.writes[0].output is not None:
            last = (
                tensor
                for tensor in step.reads
                if tensor.end == position + 1 and tensor.first >= 0 and tensor.shape == step.writes[0].shape
            )
            for tensor in last:
                tensor.end = position
                break


def _without_place(tensors: list[Tensor], taken: list[tuple[int, list]]) -> list[Tensor]:
    """The tensors, largest first, that do not live in the memory of a result while it is free.

    Each takes the smallest that it fits into. Results and tensors below 1 % of the largest are left alone.
    """
    rest, taken = [], sorted(taken, key=lambda each: each[0])
    least = 0.01 * taken[-1][0] if taken else inf
    taken = [each for each in taken if each[0] >= least]
    for tensor in sorted(tensors, key=lambda tensor: -tensor.shape.bytes):
        if tensor.output is not None:
            continue
        for size, times in taken if tensor.shape.bytes >= least else ():
            if size >= tensor.shape.bytes and all(
                tensor.end <= first or end <= tensor.first for first, end in times
            ):
                times.append((tensor.first, tensor.end))
                break
        else:
            rest.append(tensor)
    return rest


def _most(tensors: list[Tensor], steps: int) -> tuple[int, int]:
    """(the step in which most bytes of the tensors live, those bytes)."""
    change = Counter()
    for tensor in tensors:
        change[tensor.first] += tensor.shape.bytes
        change[tensor.end] -= tensor.shape.bytes
    live, best = 0, (0, 0)
    for position in range(steps):
        live += change[position]
        if live > best[1]:
            best = position, live
    return best
