"""Reads the text of an HLO module: its instructions, FLOPs of matrix products, and collectives.

XLA prints this text of a module before any optimisation: one instruction a line, operands by name.
https://openxla.org/xla/operation_semantics describes the operations.
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
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_PARENTHESIS = re.compile(r"[()]")
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


@dataclass(frozen=True)
class Shape:
    """The element type and the sizes of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size of the array."""
        return BYTES[self.dtype] * prod(self.sizes)


@dataclass(frozen=True)
class Instruction:
    """One line of the module.

    `shapes` has one entry, or one for each element where the result is a tuple; `inside` is the text of the
    operands (of a parameter, its number), `rest` what follows.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    is_root: bool

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as lhs_contracting_dims={1}; empty where it is missing."""
        found = re.search(rf"\b{attribute}={{([0-9,]*)}}", self.rest)
        return _integers(found[1]) if found else ()

    @property
    def replica_groups(self) -> list[list[int]]:
        """The groups of a collective; for a permutation, its pairs of source and target."""
        found = re.search(r"(?:replica_groups|source_target_pairs)={((?:{[0-9,]*},?)*)}", self.rest)
        return [list(_integers(group)) for group in re.findall(r"{([0-9,]*)}", found[1])]


@dataclass(frozen=True)
class Collective:
    """A message. `bytes` is the size of the arrays that a core sends or receives, whichever is more.

    Scalars are not counted: they only keep collectives in order.
    """

    opcode: str
    replica_groups: list[list[int]]
    bytes: int


class Graph:
    """The entry computation of a module.

    Raises ValueError for a text without one, and for a branch or a loop, whose instructions are not counted.
    """

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        lines = iter(text.splitlines())
        if not any(line.startswith("ENTRY ") for line in lines):  # skips the lines up to it
            raise ValueError("this text has no ENTRY computation: an HLO module was expected")
        for line in lines:
            if line.startswith("}"):
                break
            self.instructions.append(_parse(line))
        self.by_name = {each.name: each for each in self.instructions}
        for each in self.instructions:
            if each.opcode in ("while", "conditional", "call", "fusion"):
                raise ValueError(
                    f"the instruction {each.name} ({each.opcode}) has a computation of its own: "
                    "it is not counted"
                )

    @cached_property
    def operations(self) -> Counter:
        """The number of instructions of each opcode."""
        return Counter(each.opcode for each in self.instructions)

    @property
    def root(self) -> Instruction:
        """The instruction whose operands are the module's results."""
        return next(each for each in self.instructions if each.is_root)

    @property
    def input_bytes(self) -> int:
        """Total size of the module's parameters."""
        return sum(
            shape.bytes for each in self.instructions if each.opcode == "parameter" for shape in each.shapes
        )

    @property
    def output_bytes(self) -> int:
        """Total size of the module's results."""
        return sum(shape.bytes for shape in self.root.shapes)

    @property
    def dot_flops(self) -> int:
        """FLOPs of all matrix products: 2 x elements of the result x length of the sums."""
        total = 0
        for each in self.instructions:
            if each.opcode == "dot":
                left = self.by_name[each.operands[0]].shapes[0]
                contracted = prod(left.sizes[dim] for dim in each.numbers("lhs_contracting_dims"))
                total += 2 * prod(each.shapes[0].sizes) * contracted
        return total

    @property
    def collectives(self) -> list[Collective]:
        """The collectives in the order of the program."""
        found = []
        for each in self.instructions:
            if each.opcode in COLLECTIVES:
                sent = [shape for name in each.operands for shape in self.by_name[name].shapes]
                sizes = [
                    sum(shape.bytes for shape in shapes if shape.sizes) for shapes in (sent, each.shapes)
                ]
                found.append(Collective(each.opcode, each.replica_groups, max(sizes)))
        return found


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _parse(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]}")
    root, name, shapes, opcode, rest = found.groups()
    inside, rest = _split(rest)
    operands = () if opcode in ("parameter", "constant", "iota") else tuple(re.findall(r"%([\w.-]+)", inside))
    arrays = tuple(Shape(dtype, _integers(sizes)) for dtype, sizes in _SHAPE.findall(shapes))
    return Instruction(name, opcode, arrays, operands, inside, rest, bool(root))


def _split(text: str) -> tuple[str, str]:
    """(the text before the parenthesis that closes the operands, the text after it)."""
    depth = 1
    for found in _PARENTHESIS.finditer(text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[: found.start()], text[found.end() :]
    raise ValueError(f"not the operands of an HLO instruction: {text[:120]}")
