"""What a replayed function can reach: each kind of change is noticed and named, and nothing else is."""

import types

import pytest
import torch

from parallel.graph.watched import Watched


def make_state():
    layer = torch.nn.Linear(2, 3)
    return types.SimpleNamespace(
        layer=layer,
        rate=0.5,
        names={},
        loss_hooks=1.5,
        weights=[layer.weight, layer.bias],
        pair=(layer, [1, 2]),
    )


CHANGES = {
    "an attribute": (lambda state: setattr(state, "rate", 0.6), "SimpleNamespace.rate"),
    "an attribute with hooks in its name": (
        lambda state: setattr(state, "loss_hooks", 2.5),
        "SimpleNamespace.loss_hooks",
    ),
    "a new attribute": (lambda state: setattr(state, "more", 1), "what SimpleNamespace holds"),
    "an attribute that went": (lambda state: delattr(state, "rate"), "what SimpleNamespace holds"),
    "an empty dictionary": (lambda state: state.names.update(a=1), "what a dictionary holds"),
    "a list": (lambda state: state.weights.append(1), "what a list holds"),
    "a list in a tuple": (lambda state: state.pair[1].reverse(), "what a list holds"),
    "a parameter": (
        lambda state: setattr(state.layer, "weight", torch.nn.Parameter(torch.ones(3, 2))),
        "a dictionary.weight",
    ),
    "a setting of a module": (lambda state: state.layer.eval(), "Linear.training"),
    "a buffer": (lambda state: state.layer.register_buffer("more", torch.ones(1)), "what a dictionary holds"),
    "a hook": (
        lambda state: state.layer.register_forward_hook(lambda *arguments: None),
        "the hooks of a module",
    ),
    "requires_grad": (
        lambda state: state.layer.bias.requires_grad_(False),
        "a dictionary.bias's requires_grad",
    ),
    "a dtype": (
        lambda state: setattr(state.layer.bias, "data", torch.ones(3, dtype=torch.bfloat16)),
        "a dictionary.bias's requires_grad, dtype",
    ),
    "a shape": (
        lambda state: setattr(state.layer.bias, "data", torch.ones(4)),
        "a dictionary.bias's requires_grad, dtype, shape",
    ),
    "a gradient": (
        lambda state: setattr(state.layer.bias, "grad", torch.ones(3)),
        "a dictionary.bias's requires_grad, dtype, shape or gradient",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_named_each_time(kind):
    change, expected = CHANGES[kind]
    state = make_state()
    watched = Watched([state])
    assert watched.change() == ""
    change(state)
    for _ in range(2):
        assert watched.change().startswith(expected)


def test_what_is_set_to_the_same_object_has_not_changed():
    state = make_state()
    watched = Watched([state])
    for _ in range(3):
        state.rate, rate = None, state.rate
        state.rate = rate
        state.layer.train()
        assert watched.change() == ""


def test_a_list_that_was_replaced_by_one_of_the_same_objects_is_watched_on():
    state = make_state()
    watched = Watched([state])
    state.weights = list(state.weights)
    assert watched.change() == ""
    state.weights.reverse()
    assert watched.change() == "SimpleNamespace.weights"
