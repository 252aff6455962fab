"""Reads the text of an HLO module: instructions, FLOPs of its products, collectives, and the most bytes that
live at once.

The text is what XLA prints of a module before any optimisation: one instruction a line, operands by name. The
operations are described in https://openxla.org/xla/operation_semantics.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What a compiler computes where it is read, and keeps in no memory.
FREE = ("constant", "iota", "broadcast")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


@dataclass(frozen=True)
class Shape:
    """Of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * prod(self.sizes)


@dataclass(frozen=True)
class Instruction:
    """`shapes` has one entry, or of a tuple one for each element; `rest` is the text behind the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The list of an attribute such as lhs_contracting_dims={1}; empty where it has none."""
        found = re.search(rf"\b{attribute}={{([0-9,]*)}}", self.rest)
        return _integers(found[1]) if found else ()

    @property
    def replica_groups(self) -> list[list[int]]:
        """Of a collective; of a permutation, the pairs of source and target."""
        found = re.search(r"(?:replica_groups|source_target_pairs)={((?:{[0-9,]*},?)*)}", self.rest)
        return [list(_integers(group)) for group in re.findall(r"{([0-9,]*)}", found[1])]


@dataclass(frozen=True)
class Collective:
    """`bytes`: the arrays that a core gives or is given, whichever is more; scalars apart, which only carry
    an order."""

    opcode: str
    replica_groups: list[list[int]]
    bytes: int


class Graph:
    """The entry computation of a module. Raises ValueError for a text that has none, or one with a branch or
    a loop in it."""

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        lines = iter(text.splitlines())
        if not any(line.startswith("ENTRY ") for line in lines):  # takes the lines up to it
            raise ValueError("this text has no ENTRY computation: an HLO module was expected")
        for line in lines:
            if line.startswith("}"):
                break
            self.instructions.append(_parse(line))
        self.by_name = {each.name: each for each in self.instructions}
        for each in self.instructions:
            if each.opcode in ("while", "conditional", "call", "fusion"):
                raise ValueError(
                    f"the instruction {each.name} ({each.opcode}) has a computation of its own: it is not counted"
                )

    @cached_property
    def operations(self) -> Counter:
        """How often each opcode occurs."""
        return Counter(each.opcode for each in self.instructions)

    @property
    def input_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(
            shape.bytes for each in self.instructions if each.opcode == "parameter" for shape in each.shapes
        )

    @property
    def output_bytes(self) -> int:
        """Bytes of the results."""
        return sum(shape.bytes for each in self.instructions if each.is_root for shape in each.shapes)

    @property
    def dot_flops(self) -> int:
        """FLOPs of the products: 2 x elements of the result x length of the sums."""
        total = 0
        for each in self.instructions:
            if each.opcode == "dot":
                left = self.by_name[each.operands[0]].shapes[0]
                contracted = prod(left.sizes[dim] for dim in each.numbers("lhs_contracting_dims"))
                total += 2 * prod(each.shapes[0].sizes) * contracted
        return total

    @property
    def collectives(self) -> list[Collective]:
        """In the order of the program."""
        found = []
        for each in self.instructions:
            if each.opcode in COLLECTIVES:
                given = [shape for name in each.operands for shape in self.by_name[name].shapes]
                sizes = [
                    sum(shape.bytes for shape in shapes if shape.sizes) for shapes in (given, each.shapes)
                ]
                found.append(Collective(each.opcode, each.replica_groups, max(sizes)))
        return found

    def peak_bytes(self) -> int:
        """The most bytes that live at once beside the parameters.

        Instructions run in the order of the text; a result lives from its instruction to the last one that
        reads it, those of the module to the end. Nothing is fused: every result is written to memory, but
        those of FREE; tuples, reshapes and barriers are names for what is there already. Nothing takes the
        place of an operand, results of the module not of parameters.
        """
        held: dict[
            str, list[int]
        ] = {}  # instruction -> the buffers that its result is in, one for each element
        sizes: list[int] = []  # of each buffer
        born: list[int] = []
        dies: list[int] = []
        for place, each in enumerate(self.instructions):
            below = [held[name] for name in each.operands]
            for buffer in (buffer for buffers in below for buffer in buffers):
                dies[buffer] = place
            if each.opcode == "get-tuple-element":
                held[each.name] = [below[0][int(re.search(r"index=(\d+)", each.rest)[1])]]
            elif each.opcode in ("tuple", "reshape", "opt-barrier"):
                held[each.name] = [buffer for buffers in below for buffer in buffers]
            else:
                held[each.name] = list(range(len(sizes), len(sizes) + len(each.shapes)))
                for shape in each.shapes:
                    sizes.append(0 if each.opcode in (*FREE, "parameter") else shape.bytes)
                    born.append(place)
                    dies.append(place)
            if each.is_root:
                for buffer in held[each.name]:
                    dies[buffer] = len(self.instructions)
        change = Counter()
        for size, first, last in zip(sizes, born, dies, strict=True):
            change[first] += size
            change[last + 1] -= size  # an operand lives while the instruction that reads it last is running
        live = peak = 0
        for place in range(len(self.instructions)):
            live += change[place]
            peak = max(peak, live)
        return peak


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _parse(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]}")
    root, name, shapes, opcode, rest = found.groups()
    inside, behind = _split(rest)
    operands = () if opcode in ("parameter", "constant", "iota") else tuple(re.findall(r"%([\w.-]+)", inside))
    arrays = tuple(Shape(dtype, _integers(sizes)) for dtype, sizes in _SHAPE.findall(shapes))
    return Instruction(name, opcode, arrays, operands, behind, bool(root))


def _split(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes the operands, and behind it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    raise ValueError(f"not the operands of an HLO instruction: {text[:120]}")
