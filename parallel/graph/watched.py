"""What a function can reach in Python, and whether it is still what it was."""

import sys
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, eq, is_
from types import ModuleType
from typing import Any

import torch
from torch._C._dynamo.guards import dict_version
from torch.utils.hooks import RemovableHandle

OURS = ("data", "model", "parallel", "trainer")  # packages whose module variables are watched
PLAIN = (int, float, complex, bool, str, bytes, type(None), type, ModuleType, torch.Tensor, torch.dtype)
HOOKS = "_hooks"  # a part of the names of the dictionaries of an nn.Module that hold hooks
KIND = [attrgetter(name) for name in ("requires_grad", "dtype", "shape")]  # of a tensor


def is_opaque(thing: Any) -> bool:
    """Whether what the object holds does not matter for what a function records."""
    return getattr(thing, "is_opaque_to_replay", False)


class Watched:
    """The containers that are reachable from some roots, and the identity of everything that they held. Of
    tensors also what may be set in place: requires_grad, dtype, shape, and whether there is a gradient.

    Containers are dictionaries, lists, tuples, the attributes of objects, closures, and the variables of this
    project's modules and of the module of a root function. An object that is opaque to replay is not entered.
    It is compared before each replay. Most of what is watched is in dictionaries, and Python gives a
    dictionary a new version whenever it changes (PEP 509): only those with a new version are looked into.
    """

    def __init__(self, roots: Iterable[Any]):
        roots = list(roots)
        self._hooks: list[dict] = []  # dictionaries of modules
        self._hook_id = RemovableHandle.next_id
        self._dictionaries: list[dict] = []
        self._empty: list[dict] = []  # whose versions do not show an update of theirs (Python 3.12)
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
        self._versions = list(map(dict_version, self._dictionaries))
        self._version_sum = sum(self._versions)
        self._contents = [each.copy() for each in self._dictionaries]
        self._lengths, self._in_lists = list(map(len, self._lists)), list(chain(*self._lists))
        held = chain(*(each.values() for each in self._contents), self._in_lists)
        self._tensors = list({id(each): each for each in held if _is_leaf(each)}.values())
        self._kinds = list(map(list, self._kinds_now()))

    def _note(self, dictionary, owner):
        self._dictionaries.append(dictionary)
        self._owners.setdefault(id(dictionary), owner)

    def _enter(self, thing) -> Iterable[Any]:
        """Note a container; returns what is in it."""
        if isinstance(thing, torch.nn.Module):
            return self._enter_module(thing)
        if isinstance(thing, tuple):
            return thing
        if isinstance(thing, dict) and not thing:
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
        self._note(attributes, type(module).__name__)
        empty = [name for name in attributes if HOOKS in name and not attributes[name]]
        self._hooks += [attributes[name] for name in empty]
        return [value for name, value in attributes.items() if name not in empty]

    def _has_new_hook(self):
        # Each module has ten dictionaries of hooks. Whoever registers one, anywhere, raises this number.
        if self._hook_id == RemovableHandle.next_id:
            return False
        if any(self._hooks):
            return True
        self._hook_id = RemovableHandle.next_id
        return False

    def _kinds_now(self) -> list[Iterable]:
        """For each attribute its values, by tensor."""
        have_gradients = (tensor.grad is not None for tensor in self._tensors)
        return [*(map(attribute, self._tensors) for attribute in KIND), have_gradients]

    def change(self) -> str:
        """What changed first, in words; empty if nothing. A list that was replaced by one of the same objects
        has not changed."""
        if self._has_new_hook():
            return f"the hooks of a module ({next(filter(None, self._hooks))})"
        return self._change_in_dictionaries() or self._change_in_lists() or self._change_of_tensors()

    def _change_in_dictionaries(self):
        if any(self._empty):
            return "what a dictionary holds"
        # Versions only rise. So their sum, which takes no list of them, shows whether any one did.
        if sum(map(dict_version, self._dictionaries)) == self._version_sum:
            return ""
        for number, now in enumerate(self._dictionaries):
            version, before = dict_version(now), self._contents[number]
            if version == self._versions[number]:
                continue
            if now.keys() != before.keys():
                return f"what {self._owners[id(now)]} holds"
            changed = [name for name, old in before.items() if now[name] is not old]
            for name in changed:
                if not _same_objects(now[name], before[name]):
                    return f"{self._owners[id(now)]}.{name}"
            if not changed:
                self._versions[number] = version
        self._version_sum = sum(self._versions)
        return ""

    def _change_in_lists(self):
        same_lengths = list(map(len, self._lists)) == self._lengths
        same = same_lengths and all(map(is_, chain(*self._lists), self._in_lists))
        return "" if same else "what a list holds"

    def _change_of_tensors(self):
        for now, before in zip(self._kinds_now(), self._kinds, strict=True):
            same = list(map(eq, now, before))
            if not all(same):
                holder = self._holder(self._tensors[same.index(False)])
                return f"{holder}'s requires_grad, dtype, shape or gradient"
        return ""

    def _holder(self, tensor):
        """The first name that a tensor has."""
        for dictionary in self._dictionaries:
            for name, each in dictionary.items():
                if each is tensor:
                    return f"{self._owners[id(dictionary)]}.{name}"
        return "a tensor in a list"


def _is_leaf(thing) -> bool:
    return isinstance(thing, torch.Tensor) and thing.is_leaf


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
