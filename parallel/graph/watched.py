"""What a function can reach in Python, and whether it is still what it was."""

import sys
from collections.abc import Iterable
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any

import torch

OURS = ("data", "model", "parallel", "trainer")  # packages whose module variables are watched
PLAIN = (int, float, complex, bool, str, bytes, type(None), type, ModuleType, torch.Tensor, torch.dtype)
HOOKS = "_hooks"  # ends the names of nn.Module's dictionaries of hooks
END = object()


class Watched:
    """The containers that are reachable from some roots, and the identity of everything that they held.

    Containers are dictionaries, lists, tuples, the attributes of objects, closures, and the variables of this
    project's modules and of the module of a root function. An object whose class says `is_opaque_to_replay`
    is not entered.
    """

    def __init__(self, roots: Iterable[Any]):
        roots = list(roots)
        modules = [vars(module) for name, module in list(sys.modules.items()) if name.split(".")[0] in OURS]
        own = [root.__globals__ for root in map(_inner, roots) if hasattr(root, "__globals__")]
        self._dictionaries: list[dict] = [*modules, *own]
        self._sequences: list[list | tuple] = [tuple(roots)]  # which keeps them: an id is of a living object
        seen, waiting = set(), roots
        while waiting:
            thing = waiting.pop()
            opaque = isinstance(thing, PLAIN) or getattr(thing, "is_opaque_to_replay", False)
            if not opaque and id(thing) not in seen:
                seen.add(id(thing))
                waiting += self._enter(thing)
        self._identities = list(self._contents())

    def _enter(self, thing) -> Iterable[Any]:
        """Note a container; returns what is in it."""
        if isinstance(thing, dict):
            self._dictionaries.append(thing)
            return thing.values()
        if isinstance(thing, (list, tuple)):
            self._sequences.append(thing)
            return thing
        if callable(thing) and not isinstance(thing, torch.nn.Module):
            return _carried(thing)
        if hasattr(thing, "__dict__"):
            self._dictionaries.append(vars(thing))
            return [value for name, value in vars(thing).items() if not name.endswith(HOOKS)]
        return ()

    def _contents(self):
        dictionaries = chain.from_iterable(map(dict.values, self._dictionaries))
        return chain(dictionaries, chain.from_iterable(self._sequences), (END,))

    def unchanged(self) -> bool:
        """Whether every container holds the very objects that it held."""
        return all(map(is_, self._contents(), self._identities))


def _carried(function) -> list:
    """What a function or method carries along: its object, its closure and its defaults."""
    inner = _inner(function)
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    return [getattr(function, "__self__", None), *cells, *(getattr(inner, "__defaults__", None) or ())]


def _inner(function):
    """The function of a method, or in a decorator such as torch.no_grad()."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__wrapped__", function)
