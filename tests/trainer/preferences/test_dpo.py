"""DPO's loss, figures and gradients, and the reference, against transformers and peft in float64, over
topologies."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.packing import pack
from tests.support.examples import rows_of
from tests.support.models import save_adapter, save_llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, VOCABULARY = 32, 64
# Name -> settings of the objective.
OBJECTIVES = {
    "sigmoid": {"beta": 0.3},
    "smoothed": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.3, "loss": "ipo"},
    "rpo": {"beta": 0.3, "rpo_alpha": 0.7},
}
# World size -> (tp, pp, accumulation, packing, sequence parallel, objective).
CASES = {
    1: [(1, 1, 3, True, False, name) for name in OBJECTIVES],
    2: [(1, 2, 1, True, False, "rpo"), (1, 1, 3, False, False, "sigmoid")],
    8: [(4, 1, 3, True, True, "rpo"), (4, 2, 1, False, False, "smoothed"), (2, 2, 3, True, True, "ipo")],
}


def pairs():
    """[(prompt, chosen, rejected)], each a list of token ids; answers of one token too."""
    rng = np.random.default_rng(3)
    sizes = [(3, 4, 2), (5, 1, 6), (2, 3, 3), (6, 5, 1), (1, 2, 7), (4, 4, 4), (2, 1, 1)]
    return [[rng.integers(3, VOCABULARY, size).tolist() for size in each] for each in sizes]


def pair_rows(packing):
    """The pairs as rows of LENGTH tokens."""
    examples = [
        (np.array(prompt + answer), np.arange(len(prompt + answer)) >= len(prompt))
        for prompt, *answers in pairs()
        for answer in answers
    ]
    lengths = [len(examples[2 * n][0]) + len(examples[2 * n + 1][0]) for n in range(len(pairs()))]
    packed = pack(lengths, LENGTH) if packing else [[n] for n in range(len(lengths))]
    groups = [[piece for n in row for piece in (2 * n, 2 * n + 1)] for row in packed]
    return replace(rows_of(examples, groups, LENGTH), segments=max(map(len, groups)))


def on_topologies(runtime, cases, base):
    """[(reference, counts, gradient norm, gradients with their shards)] of a step of each case: one step has
    all pairs."""
    from data.loader import Loader
    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import add_lora
    from model.stage import schedule
    from model.weights.loading import fill
    from model.weights.peft import PeftAdapter
    from model.weights.sources import SafetensorsFiles
    from parallel.buckets import Buckets
    from parallel.collectives import all_reduce
    from parallel.gradients import GradientAccumulator, global_norm
    from parallel.mesh import Mesh
    from parallel.pipeline import Pipeline
    from parallel.shard import named_shards
    from trainer.build import TrainState
    from trainer.loop import forward_backward
    from trainer.objective import DirectPreferenceOptimization
    from trainer.pipelined import forward_backward_in_ticks
    from trainer.reference import compute_reference

    found = []
    for tp, pp, accumulation, packing, sequence_parallel, name in cases:
        mesh, rows = Mesh.create(runtime.rank, runtime.world_size, tp, pp), pair_rows(packing)
        batch_size = -(-len(rows) // (mesh.dp.size() * accumulation))
        batch_size += batch_size % pp  # micro-batches of the pipeline: two
        objective = DirectPreferenceOptimization(**OBJECTIVES[name])
        layout = {"dp_rank": mesh.dp.rank(), "dp_size": mesh.dp.size(), "seed": 0}
        loader = Loader(rows, batch_size=batch_size, accumulation=accumulation, **layout)
        for adapter in (None, PeftAdapter(Path(base) / "adapter")):
            model = Llama(
                ModelConfig.from_pretrained(Path(base)),
                mesh.tp,
                sequence_parallel=sequence_parallel,
                pipeline=Pipeline(mesh.pp, mesh.model, 2 if pp > 1 else 1),
            )
            if adapter:
                add_lora(model, adapter.config)
            fill(model, SafetensorsFiles(Path(base)), runtime.device, 0, adapter and adapter.read)
            if adapter is None:
                runtime.mark_step()
                batches = Loader(rows, batch_size=batch_size, accumulation=1, **layout)
                reference = compute_reference(runtime, model, mesh, batches)
        loader.rows = replace(rows, values=reference)
        model.train().requires_grad_(True)  # LoRA and all weights at once
        buckets = Buckets(list(named_shards(model)), mesh, False, 4 * 1000)
        accumulator = GradientAccumulator(buckets, 2 + len(objective.FIGURES), runtime.device, True)
        ticks = schedule(model, batch_size, LENGTH, runtime.device)
        state = TrainState(None, mesh, model, buckets, accumulator, ticks, objective=objective)
        for batch in loader.step(0):
            batch = {each: tensor.to(runtime.device) for each, tensor in batch.items()}
            if ticks.ticks:
                forward_backward_in_ticks(state, batch, runtime.mark_step)
            else:
                runtime.mark_step("micro_batch", forward_backward, state, batch)
        counts = all_reduce(accumulator.counts, mesh.dp)
        gradients = [grad_sum / counts[:1] for grad_sum in buckets.reduce(accumulator.grad_sums)]
        norm = global_norm(buckets, gradients)
        runtime.mark_step()
        on_host = [gradient.cpu() for gradient in gradients]
        pieces = {each: (*buckets.own_piece(each, on_host), shard) for each, shard in buckets.shards.items()}
        pieces = {each: piece for each, piece in pieces.items() if not piece[2].padding}
        found.append((reference, counts.tolist(), norm.item(), pieces))
    return found


def logps(model, prompt, answer):
    """The log-probability of an answer, by transformers."""
    ids = torch.tensor([prompt + answer])
    scores = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(answer)[:, None]).sum()


def dense(adapted, beta, loss="sigmoid", label_smoothing=0.0, rpo_alpha=None):
    """(reference [2 x pairs], [units, tokens, *sums of the figures], gradients by our names), in float64.

    The losses are written as in trl: cDPO's of two terms, IPO's of means per token.
    """
    adapted.zero_grad()
    references, figures = [], []
    for prompt, *answers in pairs():
        with torch.no_grad(), adapted.disable_adapter():
            reference = [logps(adapted, prompt, answer) for answer in answers]
        policy = [logps(adapted, prompt, answer) for answer in answers]
        chosen, rejected = (each - known for each, known in zip(policy, reference, strict=True))
        if loss == "ipo":
            delta = chosen / len(answers[0]) - rejected / len(answers[1])
            value = (delta - 1 / (2 * beta)) ** 2
        else:
            delta = beta * (chosen - rejected)
            value = -F.logsigmoid(delta) * (1 - label_smoothing) - F.logsigmoid(-delta) * label_smoothing
        if rpo_alpha:
            value = value - rpo_alpha * policy[0] / len(answers[0])
        value.backward()
        references += [each.item() for each in reference]
        accuracy = float(chosen > rejected)
        rewards = [beta * chosen, beta * rejected, accuracy, beta * (chosen - rejected)]
        figures.append([float(torch.as_tensor(each).detach()) for each in (value, *rewards, *policy)])
    tokens = sum(2 * len(prompt) + len(one) + len(other) for prompt, one, other in pairs())
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad / len(pairs())
        for name, parameter in adapted.named_parameters()
    }
    return references, [len(pairs()), tokens, *np.sum(figures, 0)], gradients


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory of a model with an adapter, the adapted model of peft in float64)."""
    directory = tmp_path_factory.mktemp("base")
    model = save_llama(
        directory,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return directory, save_adapter(model, directory / "adapter", LINEAR).double().requires_grad_(True)


@pytest.mark.process
@pytest.mark.parametrize("world_size", CASES)
def test_dpo_is_that_of_trl_on_every_topology(base, world_size):
    from tests.support.on_ranks import on_ranks

    directory, adapted = base
    results = on_ranks(on_topologies, world_size, cases=CASES[world_size], base=str(directory))
    for number, case in enumerate(CASES[world_size]):
        expected_reference, expected_counts, expected = dense(adapted, **OBJECTIVES[case[-1]])
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
        held = set()
        for found in results:
            reference, counts, found_norm, gradients = found[number]
            assert np.abs(reference - expected_reference).max() < 1e-4, case
            assert np.allclose(counts, expected_counts, rtol=1e-5, atol=1e-4), (case, counts, expected_counts)
            assert abs(found_norm - norm) < 1e-5 * norm, (case, found_norm, norm)
            held |= set(gradients)
            for name, (gradient, first, shard) in gradients.items():
                part = expected[name][shard.slices].flatten()[first : first + len(gradient)]
                error = (gradient.double() - part).norm() / expected[name].norm()
                assert error < 1e-5, (case, name, error)
        assert held == set(expected), case
