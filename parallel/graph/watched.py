"""What a function can reach in Python, and whether it is still what it was."""

import sys
from collections.abc import Iterable
from itertools import chain, islice, repeat
from operator import is_
from types import ModuleType
from typing import Any

import torch

OURS = ("data", "model", "parallel", "trainer")  # packages whose module variables are watched
PLAIN = (int, float, complex, bool, str, bytes, type(None), type, ModuleType, torch.Tensor, torch.dtype)
HOOKS = "_hooks"  # ends the names of nn.Module's dictionaries of hooks
END = object()


def is_opaque(thing: Any) -> bool:
    """Whether what the object holds does not matter for what a function records."""
    return getattr(thing, "is_opaque_to_replay", False)


class Watched:
    """The containers that are reachable from some roots, and the identity of everything that they held.

    Containers are dictionaries, lists, tuples, the attributes of objects, closures, and the variables of this
    project's modules and of the module of a root function. An object that is opaque to replay is not entered.
    """

    def __init__(self, roots: Iterable[Any]):
        roots = list(roots)
        self._dictionaries: list[dict] = []
        self._owners: list[str] = []  # of the dictionaries
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in OURS:
                self._note(vars(module), name)
        for root in map(_inner, roots):
            if hasattr(root, "__globals__"):
                self._note(root.__globals__, root.__module__)
        self._sequences: list[list | tuple] = [tuple(roots)]  # which keeps them: an id is of a living object
        seen, waiting = set(), roots
        while waiting:
            thing = waiting.pop()
            if not isinstance(thing, PLAIN) and not is_opaque(thing) and id(thing) not in seen:
                seen.add(id(thing))
                waiting += self._enter(thing)
        self._names = [list(each) for each in self._dictionaries]
        self._lengths = [len(each) for each in chain(self._dictionaries, self._sequences)]
        self._identities = list(self._contents())

    def _note(self, dictionary, owner):
        self._dictionaries.append(dictionary)
        self._owners.append(owner)

    def _enter(self, thing) -> Iterable[Any]:
        """Note a container; returns what is in it."""
        if isinstance(thing, dict):
            self._note(thing, "a dictionary")
            return thing.values()
        if isinstance(thing, (list, tuple)):
            self._sequences.append(thing)
            return thing
        if callable(thing) and not isinstance(thing, torch.nn.Module):
            return _carried(thing)
        if hasattr(thing, "__dict__"):
            self._note(vars(thing), type(thing).__name__)
            return [value for name, value in vars(thing).items() if not name.endswith(HOOKS)]
        return ()

    def _contents(self):
        dictionaries = chain.from_iterable(map(dict.values, self._dictionaries))
        return chain(dictionaries, chain.from_iterable(self._sequences), (END,))

    def change(self) -> str:
        """What changed first, in words; empty if nothing. A list that was replaced by one of the same objects
        has not changed."""
        if all(map(is_, self._contents(), self._identities)):
            return ""
        before = iter(self._identities)
        names = chain(self._names, repeat(None))
        owners = chain(self._owners, repeat("a list"))
        containers = chain(self._dictionaries, self._sequences)
        for container, length, name, owner in zip(containers, self._lengths, names, owners, strict=False):
            held = list(islice(before, length))
            found = list(container.values() if isinstance(container, dict) else container)
            if name is not None and name != list(container) or len(found) != length:
                extra = set(container) ^ set(name) if name is not None else ()
                return f"what {owner} holds{''.join(f' ({each})' for each in extra)}"
            for place, (old, new) in enumerate(zip(held, found, strict=True)):
                if old is not new and not _same_objects(old, new):
                    return f"{owner}.{name[place]}" if name is not None else f"an element of {owner}"
        return ""


def _same_objects(one, other) -> bool:
    sequences = isinstance(one, (list, tuple)) and isinstance(other, (list, tuple))
    return sequences and len(one) == len(other) and all(map(is_, one, other))


def _carried(function) -> list:
    """What a function or method carries along: its object, its closure and its defaults."""
    inner = _inner(function)
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    return [getattr(function, "__self__", None), *cells, *(getattr(inner, "__defaults__", None) or ())]


def _inner(function):
    """The function of a method, or in a decorator such as torch.no_grad()."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__wrapped__", function)
