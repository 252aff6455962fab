"""Compares two graphs as HLO text: what changed first, in words, and the line of Python that traced it."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*)")
METADATA = re.compile(r'op_type="(\w+)"(?:.*source_file="([^"]+)" source_line=(\d+))?')
HINT = "XLA_IR_DEBUG=1 finds the line"


class Operation(NamedTuple):
    """An instruction of a graph. `made` is a hash of all that it is computed from; `line`, of the user's
    code, may be empty."""

    name: str
    type: str
    opcode: str
    value: str
    attributes: str
    made: int
    line: str
    operands: list["Operation"]

    def __str__(self):
        return f"{self.name} {self.type}{self.attributes} ({self.line or self.above})"

    @property
    def above(self) -> str:
        """The nearest line that is known of what it is computed from."""
        pending, seen = list(self.operands), set()
        while pending:
            operation = pending.pop(0)
            if operation.line:
                return f"after {operation.line}; {HINT}"
            pending += [each for each in operation.operands if id(each) not in seen]
            seen.update(map(id, operation.operands))
        return HINT


def difference(before: str, after: str) -> str:
    """What changed first between the HLO texts of two graphs, in words, with its line."""
    old, old_outputs = _operations(before, {})
    new, new_outputs = _operations(after, {each.made: each.line for each in old})
    extra, gone = _first_changed(new, old), _first_changed(old, new)
    inputs, old_inputs = _inputs(new), _inputs(old)
    if len(inputs) == len(old_inputs) and Counter(each.type for each in inputs) != Counter(
        each.type for each in old_inputs
    ):
        was, now = next(pair for pair in zip(old_inputs, inputs, strict=True) if pair[0].type != pair[1].type)
        made_at = f"made at {now.line}, " if now.line else ""
        used_at = _use(now, new) or _use(was, old) or HINT
        return f"an input is {now.type} where it was {was.type} ({made_at}used at {used_at})"
    if extra and gone and all(each.opcode == "constant" for each in extra + gone):
        was, now = gone[0], extra[0]
        used_at = _use(now, new) or _use(was, old) or HINT
        return f"a Python number is {now.value} where it was {was.value} (used at {used_at})"
    outputs, known = Counter(each.made for each in old_outputs), {each.made for each in old}
    kept = [each for each in new_outputs if each.made in known and not outputs[each.made]]
    if kept and len(new_outputs) > len(old_outputs):
        return f"a tensor is alive at its end that was not, {kept[0]}"
    if extra or gone:
        return ", ".join(
            f"{_named(side)} is {word}" for side, word in ((extra, "new"), (gone, "gone")) if side
        )
    moved = _moved(old, new)
    if moved:
        return f"a Python number, or another input, is used in other places (at {_use(moved, new) or HINT})"
    return (
        f"it has {len(new_outputs)} outputs where it had {len(old_outputs)}, or another order of operations"
    )


def input_use(text: str, number: int) -> str:
    """The first line that uses an input of a graph, from its HLO text."""
    operations, _ = _operations(text, {})
    for given in _inputs(operations):
        if int(given.value) == number:
            return _use(given, operations) or HINT
    return HINT


def output_made(text: str, number: int) -> str:
    """The operation and the line that make an output of a graph, from its HLO text."""
    _, outputs = _operations(text, {})
    return str(outputs[number]) if number < len(outputs) else HINT


def _first_changed(operations, others):
    """Those that are not among the others, though all that they are computed from is."""
    made = {each.made for each in others}
    return [
        each
        for each in operations
        if each.made not in made and all(operand.made in made for operand in each.operands)
    ]


def _inputs(operations):
    used = {
        id(operand): operand
        for each in operations
        for operand in each.operands
        if operand.opcode == "parameter"
    }
    return sorted(used.values(), key=lambda each: int(each.value))


def _moved(old, new):
    """The input whose uses differ most from those of every input before, preferably a number; None if all are
    the same."""
    before = [users for _, users in _uses(old)]

    def likeness(users):
        return max(((users & each).total() / (users | each).total() for each in before), default=0.0)

    found = [(not given.type.endswith("[]"), likeness(users), given) for given, users in _uses(new)]
    moved = [each for each in found if each[1] < 1]
    return min(moved, key=lambda each: each[:2])[2] if moved else None


def _uses(operations):
    """[(an input, a Counter of what is made of it)]."""
    users: dict[int, Counter] = {}
    for each in operations:
        for operand in each.operands:
            users.setdefault(id(operand), Counter())[each.made] += 1
    return [(each, users[id(each)]) for each in _inputs(operations)]


def _use(given, operations):
    """The first line that uses what was given, directly or not."""
    reached = {id(given)}
    for each in operations:
        if any(id(operand) in reached for operand in each.operands):
            if each.line:
                return each.line
            reached.add(id(each))
    return ""


def _named(operations):
    """One operation that stands for all: preferably one of the user's own lines."""
    return max(operations, key=lambda each: (bool(each.line), each.above != HINT))


def _operations(text, lines):
    """(operations, outputs) of an HLO text's main computation; `lines`, by `made`, knows those of operations
    traced without."""
    known: dict[str, Operation] = {}
    for root, name, kind, opcode, rest in INSTRUCTION.findall(text[text.index("ENTRY ") :]):
        rest, _, metadata = rest.partition(", metadata=")
        operands = [known[each] for each in re.findall(r"%([\w.-]+)", rest) if each in known]
        if root:  # an input among the outputs is a tensor that waits for nothing: it is not in what will run
            return list(known.values()), [each for each in operands if each.opcode != "parameter"]
        kind = re.sub(r"\{[\d,]*\}", "", kind)
        value, _, attributes = re.sub(r"%[\w.-]+|channel_id=\d+", "", rest).partition(")")
        made = hash(
            (
                kind,
                opcode,
                "" if opcode == "parameter" else value,
                attributes,
                *(each.made for each in operands),
            )
        )
        source = METADATA.search(metadata)
        traced, file, number = source.groups() if source else (opcode, None, None)
        line = line_of(file, number) or lines.get(made, "")
        known[name] = Operation(
            traced.replace("__", "::"), kind, opcode, value, attributes, made, line, operands
        )
    return [], []


def line_of(file: str | None, number: int | str | None) -> str:
    """A line of the user's code as `file:number`; empty for one of an installed package."""
    if file is None or "site-packages" in file:
        return ""
    path = Path(file)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{number}"
