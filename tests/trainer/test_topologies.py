"""Every parameter's gradient, on every rank, against a dense model of transformers and peft, over all
topologies."""

from pathlib import Path

import pytest
import torch

from tests.support.models import save_adapter, save_llama
from tests.support.on_ranks import on_ranks

pytestmark = pytest.mark.process

SEQUENCE, VOCABULARY, MICRO_BATCHES = 16, 64, 3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = ("none", "selective", "full")
ACCUMULATION = {"one": 1, "three": 3, "ragged": 3}


def micro_batch(accumulation, dp_rank, micro):
    """Two rows of two or three examples and padding; a ragged step ends with a row without targets, and one
    of padding."""
    generator = torch.Generator().manual_seed(100 * dp_rank + micro)
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=generator),
        "labels": torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=generator),
    }
    lengths = [[5, 8], [3, 4, 7]]
    batch["segment_ids"] = torch.tensor(
        [
            sum(([n] * length for n, length in enumerate(row, 1)), []) + [0] * (SEQUENCE - sum(row))
            for row in lengths
        ]
    )
    batch["position_ids"] = torch.tensor(
        [sum((list(range(length)) for length in row), []) + [0] * (SEQUENCE - sum(row)) for row in lengths]
    )
    batch["labels"][torch.rand((2, SEQUENCE), generator=generator) < 0.3] = -100
    if accumulation == "ragged" and micro == MICRO_BATCHES - 1:
        batch["labels"][0] = -100
        batch["segment_ids"][1] = 0
    batch["labels"][batch["segment_ids"] == 0] = -100
    return batch


def sharded(runtime, tp, sequence_parallel, bases):
    """{(kv heads, checkpointing, accumulation): totals, norm, clipped norm, gradients with their shards}; and
    compilations."""
    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import add_lora
    from model.weights.loading import fill
    from model.weights.peft import PeftAdapter
    from model.weights.sources import SafetensorsFiles
    from parallel.buckets import Buckets
    from parallel.collectives import all_reduce
    from parallel.gradients import clip_gradients, global_norm
    from parallel.mesh import Mesh
    from parallel.shard import named_shards

    mesh, found = Mesh.create(runtime.rank, runtime.world_size, tp), {}
    for kv_heads, base in bases.items():
        for checkpointing in CHECKPOINTING:
            model = Llama(
                ModelConfig.from_pretrained(Path(base)),
                mesh.tp,
                gradient_checkpointing=checkpointing,
                sequence_parallel=sequence_parallel,
            )
            adapter = PeftAdapter(Path(base) / "adapter")
            add_lora(model, adapter.config)
            fill(model, SafetensorsFiles(Path(base)), runtime.device, 0, adapter.read)
            model.requires_grad_(True)  # LoRA and all weights at once: more than a run trains, in one graph
            # Buckets so small that parameters are cut between them; under ZeRO-1 where the KV heads are two.
            buckets = Buckets(list(named_shards(model)), mesh, kv_heads == "2", 4 * 1000)
            sums = [[torch.zeros(shape).to(runtime.device) for shape in buckets.shapes]]
            totals = [torch.zeros(2).to(runtime.device)]
            # After one micro-batch, two and three; and after two and a ragged one.
            for before, ragged in ((0, False), (1, False), (2, False), (2, True)):
                batch = micro_batch("ragged" if ragged else "three", mesh.dp.rank(), before)
                batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
                hidden = model.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
                losses, _ = model.token_losses(hidden, batch["labels"])
                losses.sum().backward()
                sums.append(buckets.take_gradients([total.clone() for total in sums[before]]))
                totals.append(
                    totals[before]
                    + torch.stack([losses.detach().sum(), (batch["labels"] != -100).sum().float()])
                )
                runtime.mark_step()
            for accumulation, after in (("one", 1), ("three", 3), ("ragged", 4)):
                total = all_reduce(totals[after], mesh.dp)
                gradients = [each / total[1:2] for each in buckets.reduce(sums[after])]
                norm = global_norm(buckets, gradients)
                clipped = global_norm(buckets, clip_gradients(gradients, norm, 0.5))
                runtime.mark_step()
                on_host = [gradient.cpu() for gradient in gradients]
                found[kv_heads, checkpointing, accumulation] = (
                    total.cpu(),
                    norm.item(),
                    clipped.item(),
                    {
                        name: (*buckets.own_piece(name, on_host), shard)
                        for name, shard in buckets.shards.items()
                    },
                )
    return found, runtime.compilations()


def dense_micro_batch(adapted, batch):
    """(sum of losses, target tokens, gradients of the sum), in float64 but for what transformers insists to
    have in fp32."""
    examples = [
        (batch["input_ids"][row, where], batch["labels"][row, where])
        for row in range(2)
        for where in (batch["segment_ids"][row] == segment for segment in (1, 2, 3))
        if where.any()
    ]
    # Each example is a row of its own; what pads it comes after it, and a causal model does not look ahead.
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(tensors, True, padding)
        for tensors, padding in zip(zip(*examples, strict=True), (0, -100), strict=True)
    )
    loss = torch.nn.functional.cross_entropy(
        adapted(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    adapted.zero_grad()
    loss.backward()
    return (
        loss.item(),
        int((labels != -100).sum()),
        [parameter.grad.clone() for parameter in adapted.parameters()],
    )


def dense(adapted):
    """{(data parallel size, accumulation): loss, target tokens, gradients by our names, norm}."""
    expected = {}
    known = {
        (accumulation, dp_rank, micro): dense_micro_batch(adapted, micro_batch(accumulation, dp_rank, micro))
        for accumulation in ("three", "ragged")
        for dp_rank in range(2)
        for micro in range(MICRO_BATCHES)
    }
    names = [
        name.removeprefix("base_model.model.").replace(".default.", ".")
        for name, _ in adapted.named_parameters()
    ]
    for dp in (1, 2):
        for accumulation, micro_batches in ACCUMULATION.items():
            losses, tokens, gradients = zip(
                *(
                    known["three" if accumulation == "one" else accumulation, dp_rank, micro]
                    for dp_rank in range(dp)
                    for micro in range(micro_batches)
                ),
                strict=True,
            )
            for parameter, *parts in zip(adapted.parameters(), *gradients, strict=True):
                parameter.grad = sum(parts) / sum(tokens)
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in zip(names, adapted.parameters(), strict=True)
            }
            norm = torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.5).item()
            expected[dp, accumulation] = (sum(losses), sum(tokens), gradients, norm)
    return expected


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kv heads: directory of a model, with an adapter in it} and {kv heads: what `dense` says}."""
    directories, expected = {}, {}
    for kv_heads, targets, changes in (
        (1, [*LINEAR, "lm_head"], {}),
        (2, LINEAR, {"attention_bias": True, "mlp_bias": True}),
        (8, LINEAR, {"tied": True}),
    ):
        directory = tmp_path_factory.mktemp(f"kv{kv_heads}")
        model = save_llama(
            directory,
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            **changes,
        )
        adapted = save_adapter(model, directory / "adapter", targets).double()
        adapted.requires_grad_(True)
        directories[kv_heads], expected[kv_heads] = str(directory), dense(adapted)
    return directories, expected


@pytest.mark.parametrize(
    "tp, sequence_parallel", [(1, False), *((tp, on) for tp in (2, 4, 8) for on in (False, True))]
)
def test_every_gradient_is_the_dense_one(bases, tp, sequence_parallel):
    directories, expected = bases
    dp = 1 if tp >= 4 else 2
    for found, compilations in on_ranks(
        sharded, tp * dp, tp=tp, sequence_parallel=sequence_parallel, bases=directories
    ):
        assert compilations <= len(directories) * (
            len(CHECKPOINTING) + 1
        )  # a micro-batch's in each mode, and the update's
        for (kv_heads, checkpointing, accumulation), (totals, norm, clipped, gradients) in found.items():
            loss, tokens, dense_gradients, dense_norm = expected[int(kv_heads)][dp, accumulation]
            at = f"kv heads {kv_heads}, {checkpointing}, {accumulation}: "
            assert totals[1] == tokens and abs(totals[0] - loss) < 1e-5 * loss, at
            assert (
                abs(norm - dense_norm) < 1e-5 * dense_norm and abs(clipped - min(0.5, dense_norm)) < 1e-5
            ), at
            assert set(gradients) == set(dense_gradients)
            for name, (gradient, first, shard) in gradients.items():
                part = dense_gradients[name][shard.slices].flatten()[first : first + len(gradient)]
                assert len(gradient) == shard.numel // (dp if kv_heads == "2" else 1)
                error = (gradient.double() - part).norm() / dense_gradients[name].norm()
                assert error < 1e-5, f"{at}{name}: {error}"
