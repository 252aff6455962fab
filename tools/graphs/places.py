"""Remembers where operations are recorded: the module, the line of Python, and whether forward or backward.

torch_xla writes the scopes in which an operation was recorded into its HLO. Here a scope is the number of a
Place. Modules and lines of the forward are known when they are called; autograd's nodes get hooks, with which
their backward is recorded in the place of their forward. Neither adds an operation.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from parallel.graph import backend
from parallel.graph.difference import line_of

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
_SCOPE = re.compile(r'op_name="(?:[^"]*/)?place(\d+)\.\d+/')
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')


@dataclass(frozen=True)
class Place:
    """Where an operation was recorded.

    `module`: its path, such as model.layers.3.mlp, or empty. `line`: file:line, or empty. `phase`: FORWARD,
    BACKWARD, or UPDATE, which is all that follows a backward until the next forward.
    """

    module: str
    line: str
    phase: str


class Places(TorchFunctionMode):
    """The places of a step that is recorded within `recording`."""

    def __init__(self):
        super().__init__()
        self._places: list[Place] = []
        self._numbers: dict[Place, int] = {}
        self._scopes: list = []
        self._modules: list[str] = []
        self._nodes: list[Place] = []  # those whose backward runs: several, where it records a forward
        self._phase, self._records = FORWARD, False

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within this context operations are recorded with their places."""
        hooks = []
        for name, module in model.named_modules():
            hooks.append(
                module.register_forward_pre_hook(lambda _, given, name=name: self._enter_module(name, given))
            )
            hooks.append(module.register_forward_hook(lambda *called: self._leave_module(called[2])))
        self._records = True
        backend.record_lines(True)
        try:
            with self:
                yield
        finally:
            backend.record_lines(False)
            self._records = False  # hooks of nodes that live on do nothing from now on
            for hook in hooks:
                hook.remove()

    def of(self, instruction) -> Place | None:
        """The place of an instruction of the HLO; None where it was recorded in none."""
        scope = _SCOPE.search(instruction.rest)
        if not scope:
            return None
        place = self._places[int(scope[1])]
        source = _SOURCE.search(instruction.rest)
        line = line_of(*source.groups()) if source and place.phase == BACKWARD else ""
        ours = line.startswith("tools/graphs/")  # a mode that hands an operation on
        return replace(place, line=line) if line and not ours else place

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        place = self._here(_calling_line())
        if function is torch.Tensor.backward:
            self._claim(arguments[0], place)
            return function(*arguments, **(keywords or {}))
        self._enter(place)
        try:
            result = function(*arguments, **(keywords or {}))
        finally:
            self._leave()
        if torch.is_grad_enabled():
            self._claim(result, place)
        return result

    def _here(self, line: str) -> Place:
        if self._nodes:
            here = self._nodes[-1]
            return Place(self._modules[-1] if self._modules else here.module, line or here.line, BACKWARD)
        return Place(self._modules[-1] if self._modules else "", line, self._phase)

    def _enter(self, place: Place) -> None:
        number = self._numbers.setdefault(place, len(self._places))
        if number == len(self._places):
            self._places.append(place)
        self._scopes.append(backend.scope(f"place{number}"))

    def _leave(self) -> None:
        self._scopes.pop()

    def _enter_module(self, name: str, given) -> None:
        if not self._nodes:
            self._phase = FORWARD
        self._claim(given, self._here(""))  # an autograd function of ours is no torch function
        self._modules.append(name)
        self._enter(self._here(""))

    def _leave_module(self, result) -> None:
        self._claim(result, self._here(""))
        self._leave()
        self._modules.pop()

    def _claim(self, result, place: Place) -> None:
        """Let the nodes with which autograd goes back from a result be of this place, but for those that have
        one."""
        results = result if isinstance(result, (tuple, list)) else [result]
        pending = [each.grad_fn for each in results if isinstance(each, torch.Tensor) and each.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or "place" in node.metadata:
                continue
            node.metadata["place"] = True
            running = replace(place, phase=BACKWARD)  # an object of its own for each node
            node.register_prehook(lambda _, running=running: self._enter_node(running))
            node.register_hook(lambda *_, running=running: self._leave_node(running))
            pending += [below for below, _ in node.next_functions]

    def _enter_node(self, running: Place) -> None:
        if self._records:
            self._phase = UPDATE  # behind the last node
            self._nodes.append(running)
            self._enter(running)

    def _leave_node(self, running: Place) -> None:
        # A node that gets no gradient is left without having been entered.
        if self._records and self._nodes and self._nodes[-1] is running:
            self._leave()
            self._nodes.pop()


def _calling_line() -> str:
    """The innermost line that is not of an installed package, of the code that called a torch function."""
    frame = sys._getframe(2)
    while frame is not None:
        line = line_of(frame.f_code.co_filename, frame.f_lineno)
        if line:
            return line
        frame = frame.f_back
    return ""
