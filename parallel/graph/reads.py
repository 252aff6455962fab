"""Notices that a value is read from the device while a graph is recorded, and finds the line that does it."""

import sys

import torch
from torch.overrides import TorchFunctionMode

from parallel.graph import backend
from parallel.graph.difference import line_of

NAMES = (
    "item tolist cpu to numpy is_nonzero __array__ __bool__ __float__ __format__ __index__ __int__ __repr__"
)
READING = {getattr(torch.Tensor, each) for each in NAMES.split()} | {torch.equal, torch.allclose}


class Reads:
    """Within this context, reads of values are counted, those of all ranks of this process.

    With `finds_lines`, the lines are found, too. The operations that are recorded then have no lines.
    """

    def __init__(self, finds_lines: bool):
        self._finder = _Finder() if finds_lines else None

    def __enter__(self):
        self._before = backend.reads()
        if self._finder:
            self._finder.__enter__()
        return self

    def __exit__(self, *error):
        if self._finder:
            self._finder.__exit__(*error)
        self.any = backend.reads() > self._before

    @property
    def where(self) -> str:
        """The lines that were found."""
        lines = self._finder.lines if self._finder else []
        return ", ".join(dict.fromkeys(lines)) or "PT_XLA_DEBUG_LEVEL=1 shows the line"


class _Finder(TorchFunctionMode):
    """Notes the lines that call a method of a tensor that reads a value."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        before = backend.reads() if function in READING else 0
        result = function(*arguments, **(keywords or {}))
        if function in READING and backend.reads() > before:
            self.lines.append(_line())
        return result


def _line():
    """The innermost line of the user's code that is being executed."""
    frame = sys._getframe(2)
    while frame and not line_of(frame.f_code.co_filename, frame.f_lineno):
        frame = frame.f_back
    return line_of(frame.f_code.co_filename, frame.f_lineno) if frame else ""
