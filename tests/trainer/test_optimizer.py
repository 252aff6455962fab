"""AdamW against torch.optim.AdamW, and the schedules against transformers'."""

import pytest
import torch
from transformers import get_scheduler

from parallel.buckets import Buckets
from parallel.mesh import Mesh
from parallel.shard import Shard
from trainer.config import Config
from trainer.optimizer import AdamW, learning_rate, new_state


def test_twenty_steps_equal_torchs():
    """Of buckets that cut the matrix; in float64 on their side."""
    config = Config(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 4), "norm": (4,)}
    ours = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()
    }
    theirs = [torch.nn.Parameter(parameter.detach().double()) for parameter in ours.values()]
    trained = [(name, parameter, Shard(shapes[name])) for name, parameter in ours.items()]
    buckets = Buckets(trained, Mesh.create(0, 1), bucket_bytes=4 * 13)
    assert [bucket.pieces for bucket in buckets.buckets] == [
        (("matrix", 0, 13),),
        (("matrix", 13, 20),),
        (("norm", 0, 4),),
    ]
    values = {name: parameter.detach() for name, parameter in ours.items()}
    optimizer = AdamW(buckets, config, new_state(buckets, config, values, "cpu"))
    reference = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in range(20):
        rate = 0.01 * (step + 1)
        for parameter, other in zip(ours.values(), theirs, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 3)
            other.grad = parameter.grad.double()
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.step(buckets.take_gradients(None), optimizer.scalars(step, rate))
        buckets.set_parameters(optimizer.weights)
        reference.step()
        for parameter, other in zip(ours.values(), theirs, strict=True):
            torch.testing.assert_close(parameter.double(), other, rtol=1e-5, atol=1e-6)
            assert parameter.grad is None


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("flags", [{"warmup_ratio": 0.13}, {"warmup_steps": 7, "warmup_ratio": 0.5}, {}])
def test_schedules_are_those_of_hugging_face(kind, flags):
    config = Config(learning_rate=3e-4, lr_scheduler_type=kind, **flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    # Ours has a warmup for every schedule; of theirs, `constant` has none.
    warmup = {0.13: 7, 0.5: 7}.get(flags.get("warmup_ratio"), 0)
    scheduler = get_scheduler("constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, 50)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        scheduler.step()
