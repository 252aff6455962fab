"""Pipeline parallelism: every gradient against a dense model of transformers and peft, and the schedule by
itself."""

import pytest
import torch
from safetensors.torch import load_file

from data.loader import Loader
from model.lora import hf_name
from parallel.mesh import Group, Mesh
from parallel.pipeline import Pipeline
from tests.support.models import save_adapter, save_llama
from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import column, several_runs
from tools.merge_checkpoint.merging import merge
from trainer.config import parse
from trainer.job import prepare

SEQUENCE, VOCABULARY, ROWS = 12, 64, 20
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASES = {
    "untied": ([*LINEAR, "lm_head"], {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True}),
    "tied": ([*LINEAR[1:], "layers.1.self_attn.q_proj"], {"num_hidden_layers": 4, "tied": True}),
}  # on one stage alone
# World size -> (pp, tp, micro-batches, base, how), so that each of the features meets each number of stages;
# `step`: one graph.
CASES = {
    4: [
        (4, 1, 1, "tied", "selective"),
        (2, 2, 4, "tied", "sequence_parallel full"),
        (2, 1, 2, "untied", "full step"),
    ],
    8: [(4, 1, 4, "tied", "zero_1"), (2, 2, 5, "untied", "sequence_parallel zero_1")],
}


def batch_of(dp_rank):
    """Rows of two or three examples and padding; some without targets, the last all padding."""
    generator = torch.Generator().manual_seed(100 + dp_rank)
    draw = {"generator": generator, "size": (ROWS, SEQUENCE)}
    cuts = torch.randint(2, 5, (ROWS, 2), generator=generator).cumsum(1)
    places = torch.arange(SEQUENCE).expand(ROWS, -1)
    segments = 1 + (places >= cuts[:, :1]).long() + (places >= cuts[:, 1:]).long()
    segments[::2] = segments[::2].where(segments[::2] < 3, 0)
    segments[-1] = 0
    starts = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), cuts], 1)
    positions = places - starts.gather(1, (segments - 1).clamp(min=0))
    labels = (
        torch.randint(0, VOCABULARY, **draw)
        .masked_fill(torch.rand(**draw) < 0.3, -100)
        .masked_fill(segments == 0, -100)
    )
    labels[3] = -100
    return {
        "input_ids": torch.randint(0, VOCABULARY, **draw),
        "labels": labels,
        "segment_ids": segments,
        "position_ids": positions.masked_fill(segments == 0, 0),
    }


def pipelined(runtime, cases, bases):
    """[counts, loss of an evaluation, gradient norm, gradients with their shards, of the parameters that are
    no padding] of each case, by trainer/pipelined.py; compilations."""
    from pathlib import Path
    from types import SimpleNamespace

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
    from parallel.shard import named_shards
    from trainer.build import TrainState
    from trainer.evaluation import evaluate
    from trainer.objective import SupervisedFineTuning
    from trainer.pipelined import forward_backward_in_ticks, without_mark_step

    found = []
    for pp, tp, micro_batches, base, how in cases:
        mesh = Mesh.create(runtime.rank, runtime.world_size, tp, pp)
        checkpointing = next((each for each in ("full", "selective") if each in how), "none")
        model = Llama(
            ModelConfig.from_pretrained(Path(bases[base])),
            mesh.tp,
            gradient_checkpointing=checkpointing,
            sequence_parallel="sequence" in how,
            pipeline=Pipeline(mesh.pp, mesh.model, micro_batches),
        )
        adapter = PeftAdapter(Path(bases[base]) / "adapter")
        add_lora(model, adapter.config)
        fill(model, SafetensorsFiles(Path(bases[base])), runtime.device, 0, adapter.read)
        model.requires_grad_(True)  # LoRA and all weights at once: more than a run trains, in one graph
        buckets = Buckets(list(named_shards(model)), mesh, "zero_1" in how, 4 * 1000)
        batch = {name: tensor.to(runtime.device) for name, tensor in batch_of(mesh.dp.rank()).items()}
        divided = "step" not in how
        accumulator = GradientAccumulator(
            buckets, 2 + len(SupervisedFineTuning.FIGURES), runtime.device, divided
        )
        ticks = schedule(model, ROWS, SEQUENCE, runtime.device)
        state = TrainState(None, mesh, model, buckets, accumulator, ticks)
        forward_backward_in_ticks(state, batch, runtime.mark_step if divided else without_mark_step)
        totals = all_reduce(accumulator.counts, mesh.dp)
        gradients = buckets.reduce(accumulator.grad_sums)
        norm = global_norm(buckets, gradients)
        runtime.mark_step()
        on_host = [gradient.cpu() for gradient in gradients]
        pieces = {name: (*buckets.own_piece(name, on_host), shard) for name, shard in buckets.shards.items()}
        assert all(not piece.any() for piece, _, shard in pieces.values() if shard.padding)
        held_out = SimpleNamespace(evaluation_batches=lambda: [batch_of(mesh.dp.rank())] * 2)  # noqa: B023  (called here)
        found.append(
            (
                totals.tolist(),
                evaluate(runtime, model, held_out, mesh),
                norm.item(),
                {name: each for name, each in pieces.items() if not each[2].padding},
            )
        )
    return found, runtime.compilations()


def dense(adapted, dp):
    """(loss sum, gradient norm, gradients by our names) of all data parallel ranks' batches, in float64."""
    adapted.zero_grad()
    total = 0.0
    for batch in map(batch_of, range(dp)):
        examples = [
            (batch["input_ids"][row, where], batch["labels"][row, where])
            for row in range(ROWS)
            for where in (batch["segment_ids"][row] == segment for segment in (1, 2, 3))
            if where.any()
        ]
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(tensors, True, padding)
            for tensors, padding in zip(zip(*examples, strict=True), (0, -100), strict=True)
        )
        logits = adapted(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad.clone()
        for name, parameter in adapted.named_parameters()
    }
    return total, torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item(), gradients


def make_bases(directory):
    """({base: directory}, {base: the adapted model in float64})."""
    directories, adapted = {}, {}
    for base, (targets, changes) in BASES.items():
        model = save_llama(
            directory / base,
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            max_position_embeddings=64,
            **changes,
        )
        adapted[base] = (
            save_adapter(model, directory / base / "adapter", targets).double().requires_grad_(True)
        )
        directories[base] = str(directory / base)
    return directories, adapted


def check(results, world_size, cases, adapted):
    """That all ranks have compiled a graph of each kind of a case, and together hold the dense gradients."""
    graphs = sum(2 if "step" in how else 4 for *_, how in cases)  # (forward, backward,) update, evaluation
    for number, (pp, tp, micro_batches, base, how) in enumerate(cases):
        dp, at = world_size // pp // tp, f"pp {pp}, tp {tp}, {micro_batches} micro-batches, {base}, {how}: "
        loss, norm, expected = dense(adapted[base], dp)
        held, batches = set(), [batch_of(rank) for rank in range(dp)]
        targets, tokens = (
            sum(int(each[name].gt(-100 if name == "labels" else 0).sum()) for each in batches)
            for name in ("labels", "segment_ids")
        )
        for found, compilations in results:
            assert compilations == graphs
            (*counted, total), evaluated, found_norm, gradients = found[number]
            twice, mean = evaluated.units, evaluated.loss
            assert (
                counted == [targets, tokens]
                and twice == 2 * targets
                and abs(mean - loss / targets) < 1e-5 * mean
            )
            assert abs(total - loss) < 1e-5 * loss and abs(found_norm - norm) < 1e-5 * norm, (
                at,
                total,
                loss,
                found_norm,
                norm,
            )
            # peft has no padding LoRA: a weight has its plain name there.
            gradients = {
                name if name in expected else hf_name(name): each for name, each in gradients.items()
            }
            held |= set(gradients)
            for name, (gradient, first, shard) in gradients.items():
                part = expected[name][shard.slices].flatten()[first : first + len(gradient)]
                assert len(gradient) == shard.numel // (dp if "zero_1" in how else 1)
                error = (gradient.double() - part).norm() / expected[name].norm()
                assert error < 1e-5, f"{at}{name}: {error}"
        assert held == set(expected), at


@pytest.mark.process
@pytest.mark.parametrize("world_size", CASES)
def test_every_gradient_is_the_dense_one(tmp_path, world_size):
    directories, adapted = make_bases(tmp_path)
    cases = CASES[world_size]
    check(on_ranks(pipelined, world_size, cases=cases, bases=directories), world_size, cases, adapted)


def test_the_mesh_has_each_rank_once_in_each_kind_of_group():
    meshes = [Mesh.create(rank, 24, 2, 3) for rank in range(24)]
    for kind, size in (("tp", 2), ("dp", 4), ("pp", 3), ("model", 6)):
        groups = [getattr(mesh, kind) for mesh in meshes]
        assert all(
            group.replica_groups == groups[0].replica_groups and group.size() == size for group in groups
        )
        assert sorted(sum(groups[0].replica_groups, [])) == list(range(24))
        for rank, group in enumerate(groups):
            assert any(ranks[group.rank()] == rank for ranks in group.replica_groups), (kind, rank)
    assert meshes[9].pp.replica_groups[1] == [1, 9, 17] and meshes[9].model.replica_groups[0] == [
        0,
        1,
        8,
        9,
        16,
        17,
    ]


def test_layers_are_dealt_out_evenly():
    def dealt(layers, stages):
        return [Pipeline(Group([list(range(stages))], stage)).layer_ids(layers) for stage in range(stages)]

    assert dealt(6, 2) == [[0, 1, 2], [3, 4, 5]]
    assert dealt(5, 4) == [[0, 1], [2, 6], [3, 7], [4, 8]]  # 6, 7 and 8 are padding
    with pytest.raises(ValueError, match="num_hidden_layers 3 is less than --pipeline_parallel_size 4"):
        dealt(3, 4)


# Name: (pp, tp, rows on each data parallel rank, flags); 8 rows a step on four ranks.
RUNS = {
    "stages": (2, 2, 8, "--num_microbatches 4 --gradient_checkpointing"),
    "one": (1, 2, 4, "--zero_1"),
    "divided": (2, 1, 2, "--gradient_accumulation_steps 2 --zero_1"),
}
MODES = {
    "lora": "--lora_r 4 --lora_dropout 0.1 --lora_target_modules q_proj,down_proj,lm_head --do_eval",
    "full": "--lora_r 0 --weight_decay 0.1",
}


@pytest.mark.process
def test_runs_are_saved_and_go_on_with_other_stages(tmp_path):
    """Three layers, so that one is padding; with dropout; the merged model is what one stage has trained."""
    save_llama(tmp_path / "base", hidden_size=32, intermediate_size=48)

    def command(mode, run, output, *more):
        pp, tp, rows, flags = RUNS[run]
        return [
            "--model_id",
            str(tmp_path / "base"),
            "--max_seq_length",
            "64",
            "--learning_rate",
            "1e-3",
            "--max_steps",
            "4",
            "--save_steps",
            "2",
            "--on_recompile",
            "error",
            "--pipeline_parallel_size",
            str(pp),
            "--tensor_parallel_size",
            str(tp),
            *flags.split(),
            "--per_device_train_batch_size",
            str(rows),
            *MODES[mode].split(),
            "--output_dir",
            str(tmp_path / output),
            *more,
        ]

    commands = [command(mode, run, f"{mode}-{run}") for mode in MODES for run in ("one", "stages")]
    for mode in MODES:
        run, origin = ("divided", "one") if mode == "lora" else ("one", "stages")
        commands.append(
            command(mode, run, f"{mode}-on", "--resume", f"{tmp_path}/{mode}-{origin}/checkpoint-2")
        )
    on_ranks(several_runs, 4, commands=commands)
    # In one process: step and evaluation; forward, backward, update and evaluation; without evaluation.
    compiled = [
        set(column(tmp_path / f"{mode}-{run}", "compilations")) for mode in MODES for run in ("one", "stages")
    ]
    assert compiled == [{2}, {6}, {7}, {10}]
    for mode in MODES:
        curves = [
            torch.tensor([column(tmp_path / f"{mode}-{run}", name) for name in ("loss", "grad_norm")])
            for run in ("one", "stages", "on")
        ]
        for curve in curves[1:]:
            torch.testing.assert_close(curve, curves[0][:, -curve.shape[1] :], rtol=1e-5, atol=0)
        weights = []
        for run in ("one", "stages", "on"):
            merge(tmp_path / f"{mode}-{run}" / "checkpoint-4", tmp_path / f"{mode}-{run}-merged")
            weights.append(load_file(tmp_path / f"{mode}-{run}-merged" / "model.safetensors"))
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-4)


@pytest.mark.process
def test_a_language_model_follows_transformers(tmp_path):
    """Ten losses of a full training on plain text, of which a row holds one example, beside a loop of
    transformers in float64."""
    model = save_llama(tmp_path / "base", hidden_size=32, intermediate_size=48).double()
    flags = [
        "--model_id",
        str(tmp_path / "base"),
        "--dataset",
        str(tmp_path / "text.txt"),
        "--lora_r",
        "0",
        "--max_seq_length",
        "64",
        "--learning_rate",
        "2e-3",
        "--lr_scheduler_type",
        "constant",
        "--max_steps",
        "10",
        "--weight_decay",
        "0.1",
    ]
    (tmp_path / "text.txt").write_text((ROOT / "docs/checkpoint-format.md").read_text())
    on_ranks(
        several_runs,
        4,
        commands=[
            [
                *flags,
                "--pipeline_parallel_size",
                "2",
                "--tensor_parallel_size",
                "2",
                "--per_device_train_batch_size",
                "4",
                "--output_dir",
                str(tmp_path / "ours"),
            ]
        ],
    )
    rows = prepare(parse([*flags, "--output_dir", str(tmp_path / "rows")]), 1).train_rows
    loader = Loader(rows, batch_size=4, accumulation=1, dp_rank=0, dp_size=1, seed=42)
    matrices, vectors = (
        [each for each in model.parameters() if (each.dim() > 1) is wide] for wide in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=2e-3, weight_decay=0.1
    )
    curve = []
    for step in range(10):
        [batch] = loader.step(step)
        logits = model(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0] - 0.3
    torch.testing.assert_close(column(tmp_path / "ours"), curve, rtol=1e-5, atol=0)
