"""The layers of neuronx-distributed against ours, on every rank: run by

    NXD_SOURCE=DIRECTORY python -m pytest tests/parallel/test_nxd.py

where DIRECTORY is a checkout of github.com/aws-neuron/neuronx-distributed (tests/support/nxd_on_threads.py).
Ours are compared with dense models by test_topologies.py. A rank that traced another graph than the others
would end the run.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.support.models import RELATIVES, save_adapter, save_llama, save_model
from tests.support.nxd_on_threads import needs_source
from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import SHORT, column, prepare_on_a_rank
from tests.trainer.test_extract_graphs import PROCESS
from tests.trainer.test_topologies import LINEAR, micro_batch
from trainer.checkpoint.reader import Checkpoint

pytestmark = [needs_source, pytest.mark.process]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def both(runtime, tp, bases):
    """{(base, dtype, sequence parallel): {nxd | native: losses, gradients, norm}} on this rank; the tensor
    parallel groups."""
    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import add_lora
    from model.weights.loading import fill
    from model.weights.peft import PeftAdapter
    from model.weights.sources import SafetensorsFiles
    from parallel import layers as native
    from parallel.buckets import Buckets
    from parallel.gradients import global_norm
    from parallel.shard import named_shards
    from tests.support.nxd_on_threads import join

    nxd, found = join(runtime), {}
    mesh = nxd.create_mesh(runtime.rank, runtime.world_size, tp)
    for base in bases:
        for dtype in DTYPES:
            for sequence_parallel in (False, True):
                here = found[Path(base).name, dtype, sequence_parallel] = {}
                for kind, layers in (("nxd", nxd), ("native", native)):
                    model = Llama(
                        ModelConfig.from_pretrained(Path(base)),
                        mesh.tp,
                        DTYPES[dtype],
                        layers=layers,
                        sequence_parallel=sequence_parallel,
                    )
                    adapter = PeftAdapter(Path(base) / "adapter")
                    add_lora(model, adapter.config)
                    fill(model, SafetensorsFiles(Path(base)), runtime.device, 0, adapter.read)
                    model.requires_grad_(True)  # LoRA and all weights at once
                    buckets = Buckets(list(named_shards(model)), mesh)
                    batch = {
                        name: tensor.to(runtime.device)
                        for name, tensor in micro_batch("one", mesh.dp.rank(), 0).items()
                    }
                    hidden = model.hidden_states(
                        batch["input_ids"], batch["position_ids"], batch["segment_ids"]
                    )
                    losses, _ = model.token_losses(hidden, batch["labels"])
                    losses.sum().backward()
                    gradients = buckets.reduce(buckets.take_gradients(None))
                    norm = global_norm(buckets, gradients)
                    runtime.mark_step()
                    on_host = [gradient.cpu() for gradient in gradients]
                    here[kind] = (
                        losses.detach().cpu(),
                        {name: buckets.own_piece(name, on_host)[0] for name in buckets.shards},
                        norm.item(),
                    )
                    del hidden, losses, gradients, norm, model, buckets
    return found, mesh.tp.replica_groups


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "tp, world_size, groups",
    [(2, 4, [[0, 1], [2, 3]]), (4, 4, [[0, 1, 2, 3]]), (4, 8, [[0, 2, 4, 6], [1, 3, 5, 7]])],
)
def test_llama_equals_that_of_our_layers(tmp_path, tp, world_size, groups):
    """With biases, norms of heads, multipliers, LoRA on all layers, KV heads that two ranks hold at TP 4, and
    a vocabulary that the ranks do not divide; packed rows. TP 4 is strided."""
    bases = []
    for kv_heads in (2, 4):
        bases.append(str(tmp_path / f"kv{kv_heads}"))
        base = save_llama(
            tmp_path / f"kv{kv_heads}",
            num_hidden_layers=2,
            num_key_value_heads=kv_heads,
            vocab_size=512 if kv_heads == 2 else 513,
            attention_bias=True,
            mlp_bias=True,
        )
        save_adapter(base, tmp_path / f"kv{kv_heads}" / "adapter", LINEAR)
    for name in ("qwen3 with windows", "granite"):
        kind, changes = RELATIVES[name]
        bases.append(str(tmp_path / name))
        base = save_model(tmp_path / name, kind, **changes | {"num_key_value_heads": 2})
        save_adapter(base, tmp_path / name / "adapter", LINEAR)
    worst = {}
    for found, replica_groups in on_ranks(both, world_size, tp=tp, bases=bases):
        assert replica_groups == groups and len(found) == 4 * len(bases)
        for (_, dtype, sequence_parallel), kinds in found.items():
            (losses, gradients, norm), (expected, dense, expected_norm) = kinds["nxd"], kinds["native"]
            assert len(gradients) == len(dense) > 50
            apart = [difference(losses, expected), abs(norm / expected_norm - 1)]
            apart += [difference(gradients[name], dense[name]) for name in dense]
            worst.setdefault((dtype, sequence_parallel), []).append(max(apart))
    worst = {key: max(values) for key, values in worst.items()}
    for (dtype, _), apart in worst.items():
        assert apart <= {"fp32": 1e-5, "bf16": 5e-3}[dtype], worst


def defects(runtime):
    """What its layers do with their default arguments, and what ours do with those of parallel/nxd.py, at TP
    2."""
    from parallel.graph.backend import end_graph, graph_hash, hlo_text, random_seed
    from parallel.layers import column_parallel
    from tests.support.nxd_on_threads import LOCK, join

    nxd, found = join(runtime), {}
    from neuronx_distributed.parallel_layers import layers as stock

    mesh = nxd.create_mesh(runtime.rank, runtime.world_size, 2)
    group = {"tensor_model_parallel_group": mesh.tp.process_group}
    ours = {"tensor_model_parallel_group": mesh.tp, "dtype": torch.bfloat16, "bias": False}
    whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    mine = whole.chunk(2)[mesh.tp.rank()]

    def filled(layer):
        with torch.no_grad():
            layer.weight = torch.nn.Parameter(mine.clone())
        return layer.to(runtime.device)

    with LOCK:  # it draws from the generator of the process
        column = stock.ColumnParallelLinear(
            4, 8, bias=False, gather_output=False, dtype=torch.bfloat16, **group
        )
        found["attribute"] = [hasattr(column.weight, "tensor_model_parallel")]
        column = column.to(runtime.device)
        found["attribute"].append(hasattr(column.weight, "tensor_model_parallel"))
        embeddings = {
            "stock": stock.ParallelEmbedding(8, 4, **group).to(runtime.device),
            "sequence": stock.ParallelEmbedding(
                8, 4, sequence_parallel_enabled=True, sequence_dimension=1, **group
            ).to(runtime.device),
        }
    layers = {"stock": filled(column), "ours": filled(nxd.ColumnParallelLinear(4, 8, **ours))}
    found["shards"] = layers["ours"].shards["weight"].slices
    inputs = {}
    for name, layer in layers.items():
        shape = (1, 1, 4) if name == "stock" else (1, 4)
        inputs[name] = torch.ones(shape, dtype=torch.bfloat16).to(runtime.device).requires_grad_()
        layer(inputs[name]).sum().backward()
    runtime.mark_step()
    found["dx"] = {name: x.grad.flatten().cpu() for name, x in inputs.items()} | {
        "dense": whole.sum(0),
        "mine": mine.sum(0),
    }
    for layer in layers.values():
        layer.weight.grad = None

    # Graphs that are looked at and not run.
    def graph(tensors):
        seen = graph_hash(tensors), hlo_text(tensors)
        end_graph(runtime.device, random_seed(runtime.device))
        return seen

    ids = torch.zeros(2, 2, dtype=torch.int64).to(runtime.device)
    embeddings["ours"] = nxd.ParallelEmbedding(8, 4, device="cpu", tensor_model_parallel_group=mesh.tp).to(
        runtime.device
    )
    found["embedding"] = {name: graph([layer(ids)]) for name, layer in embeddings.items()}
    x = torch.ones(1, 4, dtype=torch.bfloat16).to(runtime.device)
    three = [filled(nxd.ColumnParallelLinear(4, 8, sequence_parallel_enabled=True, **ours)) for _ in "qkv"]
    found["together"] = [
        graph(outputs())[1].count(" all-gather(")
        for outputs in (lambda: [layer(x) for layer in three], lambda: column_parallel(x, three))
    ]
    return found


def test_defects_are_there_and_avoided():
    found = on_ranks(defects, 2)
    for rank in found:
        dx = rank["dx"]
        assert torch.allclose(dx["stock"], dx["mine"]) and not torch.allclose(
            dx["stock"], dx["dense"], atol=0.1
        )
        torch.testing.assert_close(dx["ours"], dx["dense"], rtol=1e-2, atol=1e-2)
        assert rank["attribute"] == [True, False]
        sequence = rank["embedding"]["sequence"][1]
        assert "all-reduce" not in sequence and "reduce-scatter" not in sequence
        assert rank["together"] == [3, 1]
    assert [rank["shards"][0] for rank in found] == [slice(0, 4), slice(4, 8)]
    hashes = {name: {rank["embedding"][name][0] for rank in found} for name in ("stock", "ours")}
    assert len(hashes["stock"]) == 2 and len(hashes["ours"]) == 1


def unused(runtime):
    """(logits after its cross entropy, whether that knows ignore_index); and tensor parallel groups, our
    groups of replicas and its, at TP 4 on a whole node of 32 cores."""
    import inspect

    from parallel.mesh import Group, Mesh
    from tests.support.nxd_on_threads import join

    join(runtime).create_mesh(0, 1, 1)
    from neuronx_distributed.parallel_layers import parallel_cross_entropy, parallel_state

    logits = torch.tensor([[1.0, 2.0, 3.0]]).to(runtime.device)
    parallel_cross_entropy(logits, torch.tensor([2]).to(runtime.device))
    runtime.mark_step()
    loss = logits.cpu().tolist(), "ignore_index" in inspect.signature(parallel_cross_entropy).parameters
    torch.distributed.get_world_size = lambda *_: 32
    groups = parallel_state.initialize_model_parallel(4, mesh_only=True)
    tp = Group(groups.tp_groups, 0)
    mesh = Mesh(0, 32, tp, Group(groups.dp_groups, 0), Group([[rank] for rank in range(32)], 0), tp)
    return loss, (
        groups.tp_groups,
        mesh.replicas(2).replica_groups,
        parallel_state.arrange_kv_groups(8, 4, 2),
    )


def test_what_is_not_used_of_it_has_defects():
    """Its cross entropy changes the logits and knows no ignore_index; a replica group of its KV heads at TP 4
    is none of ours."""
    [((logits, ignores), (tp, replicas, kv))] = on_ranks(unused, 1)
    assert logits != [[1.0, 2.0, 3.0]] and not ignores
    assert tp[0] == [0, 8, 16, 24] and len(tp) == 8 and replicas[:2] == [[0, 8], [16, 24]]
    assert [0, 2] in kv and not any({0, 2} <= set(group) for group in tp)
    assert all(any(set(pair) <= set(group) for group in tp) for pair in replicas)


MINE = threading.local()


def whole_runs(runtime, commands):
    """trainer.loop.run of each command line; what is written to a directory nxd has neuronx-distributed's
    layers."""
    import trainer.build
    import trainer.loop
    from parallel import layers as native
    from tests.support.nxd_on_threads import join

    nxd = join(runtime)
    trainer.build.parallel_layers = lambda *_: MINE.layers
    for flags in commands:
        MINE.layers = nxd if Path(flags[-1]).name == "nxd" else native
        job = prepare_on_a_rank(runtime, flags)
        runtime.barrier()
        trainer.loop.run(runtime, job)


def test_whole_runs_and_their_checkpoints_are_those_of_our_layers(tmp_path):
    """TP 4, strided, x DP 2, with KV heads that two ranks hold; a run goes on with a checkpoint of the
    other's layers."""
    save_llama(tmp_path / "base", num_hidden_layers=1, num_key_value_heads=2)
    modes, commands = (
        {
            "lora": ["--lora_dropout", "0.1"],
            "full": ["--lora_r", "0", "--zero_1", "--gradient_checkpointing"],
        },
        [],
    )
    for mode, flags in modes.items():
        flags = [
            *SHORT,
            *flags,
            "--model_id",
            str(tmp_path / "base"),
            "--tensor_parallel_size",
            "4",
            "--save_steps",
            "2",
        ]
        commands += [
            [*flags, "--max_steps", steps, *more, "--output_dir", str(tmp_path / mode / kind)]
            for kind, steps, *more in (("nxd", "2"), ("native", "4"), ("nxd", "4", "--resume", "latest"))
        ]
        commands += [
            [
                *flags,
                "--max_steps",
                "4",
                "--resume",
                str(tmp_path / mode / "nxd" / "checkpoint-2"),
                "--output_dir",
                str(tmp_path / mode / "from_nxd"),
            ]
        ]
    on_ranks(whole_runs, 8, commands=commands)
    for mode in modes:
        output = tmp_path / mode
        for name in ("loss", "grad_norm"):
            expected = torch.tensor(column(output / "native", name))
            torch.testing.assert_close(
                torch.tensor(column(output / "nxd", name)), expected, rtol=1e-5, atol=0
            )
            torch.testing.assert_close(
                torch.tensor(column(output / "from_nxd", name)), expected[2:], rtol=1e-5, atol=0
            )
        assert column(output / "nxd", "step") == [1, 2, 3, 4]
        found, expected = (Checkpoint(output / kind / "checkpoint-4") for kind in ("nxd", "native"))
        assert found.shapes == expected.shapes
        for name in found.shapes:
            assert difference(found.read("parameter", name), expected.read("parameter", name)) < 1e-5, name


def test_a_process_as_on_neuron_trains_with_them(tmp_path):
    """One rank, of a real process group. The graph that initialises the collectives is no new graph of the
    loop."""
    program = (
        "import sys, parallel.runtime.devices as devices; devices.on_neuron = lambda: True\n"
        "import parallel.layer_backend as choice; choice.version = lambda _: '0.18.0'\n"
        "import tests.support.nxd_on_threads as nxd; nxd.install()\n"
        "import trainer.main; sys.exit(trainer.main.main())"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            *SHORT,
            "--max_steps",
            "2",
            "--on_recompile",
            "error",
            "--output_dir",
            tmp_path / "out",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | PROCESS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "neuronx-distributed's layers, and blockwise attention: a row holds up to " in done.stdout
    assert column(tmp_path / "out", "compilations")[1:] == column(tmp_path / "out", "compilations")[:1]
