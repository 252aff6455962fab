"""What a function can reach in Python, and whether it is still what it was."""

import sys
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import ModuleType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

OURS = ("data", "model", "parallel", "trainer")  # packages whose module variables are watched
PLAIN = (int, float, complex, bool, str, bytes, type(None), type, ModuleType, torch.Tensor, torch.dtype)
# nn.Module's own attributes that are dictionaries, whose contents are watched, or are never set: their names.
HOOKS = "_hooks"  # a part of them
OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
END = object()
KIND = [attrgetter(name) for name in ("requires_grad", "dtype", "shape")]  # of a tensor


def is_opaque(thing: Any) -> bool:
    """Whether what the object holds does not matter for what a function records."""
    return getattr(thing, "is_opaque_to_replay", False)


class Watched:
    """The containers that are reachable from some roots, and the identity of everything that they held. Of
    tensors also what may be set in place: requires_grad, dtype, shape, and whether there is a gradient.

    Containers are dictionaries, lists, tuples, the attributes of objects, closures, and the variables of this
    project's modules and of the module of a root function. An object that is opaque to replay is not entered.
    It is compared before each replay, so the comparison runs in C: dictionaries with equal names, as the
    modules of a model have, are read by one itemgetter.
    """

    def __init__(self, roots: Iterable[Any]):
        roots = list(roots)
        self._empty: list[Any] = []
        self._hooks: list[dict] = []  # those dictionaries of modules that are empty
        self._hook_id = RemovableHandle.next_id
        self._groups: dict[tuple, list[dict]] = {}  # by the names that are watched
        self._owners: dict[int, str] = {}  # by the id of a dictionary
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in OURS:
                self._note(vars(module), name)
        for root in map(_inner, roots):
            if hasattr(root, "__globals__"):
                self._note(root.__globals__, root.__module__)
        self._lists: list[list] = []
        self._roots = tuple(roots)  # an id is of a living object
        seen, waiting = set(), roots
        while waiting:
            thing = waiting.pop()
            if not isinstance(thing, PLAIN) and not is_opaque(thing) and id(thing) not in seen:
                seen.add(id(thing))
                waiting += self._enter(thing)
        self._lengths = list(self._sizes())
        self._identities = list(self._contents())
        self._tensors = list({id(each): each for each in self._identities if _is_leaf(each)}.values())
        self._kinds = self._kinds_now()

    def _note(self, dictionary, owner, names=None):
        """Watch these names of a dictionary; without names, all."""
        self._groups.setdefault(tuple(dictionary if names is None else names), []).append(dictionary)
        self._owners.setdefault(id(dictionary), owner)

    def _enter(self, thing) -> Iterable[Any]:
        """Note a container; returns what is in it."""
        if isinstance(thing, torch.nn.Module):
            return self._enter_module(thing)
        if isinstance(thing, tuple):
            return thing
        if isinstance(thing, (dict, list)) and not thing:
            self._empty.append(thing)
        elif isinstance(thing, dict):
            self._note(thing, "a dictionary")
            return thing.values()
        elif isinstance(thing, list):
            self._lists.append(thing)
            return thing
        elif callable(thing):
            return _carried(thing)
        elif hasattr(thing, "__dict__"):
            if not _is_frozen(thing):
                self._note(vars(thing), type(thing).__name__)
            return vars(thing).values()
        return ()

    def _enter_module(self, module):
        attributes = vars(module)
        hooks = [name for name in attributes if HOOKS in name]
        empty = [name for name in hooks if not attributes[name]]
        self._hooks += [attributes[name] for name in empty]
        names = [name for name in attributes if name not in OF_MODULES and name not in hooks]
        self._note(attributes, type(module).__name__, names)
        return [value for name, value in attributes.items() if name not in empty]

    def _containers(self):
        return chain(*self._groups.values(), self._lists)

    def _sizes(self):
        return map(len, self._containers())

    def _contents(self):
        of_dictionaries = (_values(names, each) for names, each in self._groups.items() if names)
        return chain(*of_dictionaries, *self._lists, (END,))

    def _has_new_hook(self):
        # Each module has ten dictionaries of hooks. Whoever registers one, anywhere, raises this number.
        if self._hook_id == RemovableHandle.next_id:
            return False
        self._hook_id = RemovableHandle.next_id
        return any(self._hooks)

    def _kinds_now(self) -> list[list]:
        """For each attribute its values, by tensor."""
        have_gradients = [tensor.grad is not None for tensor in self._tensors]
        return [*(list(map(attribute, self._tensors)) for attribute in KIND), have_gradients]

    def _unchanged(self):
        try:
            return (
                not any(self._empty)
                and not self._has_new_hook()
                and list(self._sizes()) == self._lengths
                and self._kinds_now() == self._kinds
                and all(map(is_, self._contents(), self._identities))
            )
        except KeyError:
            return False

    def change(self) -> str:
        """What changed first, in words; empty if nothing. A list that was replaced by one of the same objects
        has not changed."""
        if self._unchanged():
            return ""
        if any(self._hooks):
            return f"the hooks of a module ({next(filter(None, self._hooks))})"
        if any(self._empty):
            return f"something that was empty ({next(filter(None, self._empty))})"
        for now, before in zip(self._kinds_now(), self._kinds, strict=True):
            for tensor, new, old in zip(self._tensors, now, before, strict=True):
                if new != old:
                    return f"{self._holder(tensor)}'s requires_grad, dtype, shape or gradient"
        before = iter(self._identities)
        watched = ((names, each) for names, group in self._groups.items() for each in group)
        lists = ((range(len(each)), each) for each in self._lists)
        for (names, container), length in zip(chain(watched, lists), self._lengths, strict=True):
            owner = self._owners.get(id(container), "a list")
            if len(container) != length:
                return f"what {owner} holds"
            for name, old in zip(names, before, strict=False):
                new = container.get(name, END) if isinstance(container, dict) else container[name]
                if old is not new and not _same_objects(old, new):
                    return f"{owner}.{name}"
        return ""

    def _holder(self, thing):
        """The first name that a thing has."""
        for names, group in self._groups.items():
            for name, each in ((name, each) for each in group for name in names):
                if each.get(name) is thing:
                    return f"{self._owners[id(each)]}.{name}"
        return "a tensor in a list"


def _is_leaf(thing) -> bool:
    return isinstance(thing, torch.Tensor) and thing.is_leaf


def _values(names, dictionaries):
    """The values of these names in each dictionary."""
    found = map(itemgetter(*names), dictionaries)
    return found if len(names) == 1 else chain.from_iterable(found)


def _is_frozen(thing) -> bool:
    """Whether it is a dataclass whose fields cannot be set."""
    parameters = getattr(type(thing), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


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
