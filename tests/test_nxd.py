"""The layers of neuronx-distributed against ours, on every rank: run by

    NXD_SOURCE=DIRECTORY python -m pytest tests/test_nxd.py

where DIRECTORY is a checkout of github.com/aws-neuron/neuronx-distributed (tests/nxd_on_threads.py). Ours are compared with dense
models by test_topologies.py. A rank that traced another graph than the others would end the run.
"""
from pathlib import Path

import pytest
import torch

from tests.models import save_adapter, save_llama
from tests.nxd_on_threads import needs_source
from tests.on_ranks import on_ranks
from tests.test_topologies import LINEAR, SEQUENCE, micro_batch

pytestmark = needs_source
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def both(runtime, tp, bases):
    """{(base, dtype, sequence parallel): {nxd | native: losses, gradients, norm}} on this rank; and the tensor parallel groups."""
    from model.adapters import PeftAdapter
    from model.llama import Llama, LlamaConfig
    from model.lora import add_lora
    from model.weights import SafetensorsFiles, fill
    from parallel import layers as native
    from parallel.buckets import Buckets
    from parallel.gradients import global_norm
    from parallel.layers import named_shards
    from parallel.loss import parallel_cross_entropy
    from tests.nxd_on_threads import join
    nxd, found = join(runtime), {}
    mesh = nxd.create_mesh(runtime.rank, runtime.world_size, tp)
    for base in bases:
        for dtype in DTYPES:
            for sequence_parallel in (False, True):
                here = found[Path(base).name, dtype, sequence_parallel] = {}
                for kind, layers in (("nxd", nxd), ("native", native)):
                    model = Llama(LlamaConfig.from_pretrained(Path(base)), mesh.tp, DTYPES[dtype], layers=layers,
                                  sequence_parallel=sequence_parallel)
                    adapter = PeftAdapter(Path(base) / "adapter")
                    add_lora(model, adapter.config)
                    fill(model, SafetensorsFiles(Path(base)), runtime.device, 0, adapter.read)
                    model.requires_grad_(True)      # LoRA and all weights at once
                    buckets = Buckets(list(named_shards(model)), mesh)
                    batch = {name: tensor.to(runtime.device) for name, tensor in micro_batch("one", mesh.dp.rank(), 0).items()}
                    logits = model(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
                    losses = parallel_cross_entropy(logits, batch["labels"], model.rank_index, mesh.tp)
                    losses.sum().backward()
                    gradients = buckets.reduce(buckets.take_gradients(None))
                    norm = global_norm(buckets, gradients)
                    runtime.mark_step()
                    on_host = [gradient.cpu() for gradient in gradients]
                    here[kind] = (losses.detach().cpu(), {name: buckets.own_piece(name, on_host)[0] for name in buckets.shards},
                                  norm.item())
                    del logits, losses, gradients, norm, model, buckets
    return found, mesh.tp.replica_groups


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tp, world_size, groups", [
    (2, 4, [[0, 1], [2, 3]]), (4, 4, [[0, 1, 2, 3]]), (4, 8, [[0, 2, 4, 6], [1, 3, 5, 7]])])
def test_llama_equals_that_of_our_layers(tmp_path, tp, world_size, groups):
    """With biases, LoRA on all layers, and KV heads that at TP 4 two ranks hold each; packed rows. TP 4 is strided."""
    bases = []
    for kv_heads in (2, 4):
        bases.append(str(tmp_path / f"kv{kv_heads}"))
        base = save_llama(tmp_path / f"kv{kv_heads}", num_hidden_layers=2, num_key_value_heads=kv_heads, attention_bias=True,
                          mlp_bias=True, max_position_embeddings=SEQUENCE)
        save_adapter(base, tmp_path / f"kv{kv_heads}" / "adapter", LINEAR)
    worst = {}
    for found, replica_groups in on_ranks(both, world_size, tp=tp, bases=bases):
        assert replica_groups == groups and len(found) == 8
        for (base, dtype, sequence_parallel), kinds in found.items():
            (losses, gradients, norm), (expected, dense, expected_norm) = kinds["nxd"], kinds["native"]
            assert len(gradients) == len(dense) > 50
            apart = [difference(losses, expected), abs(norm / expected_norm - 1)]
            apart += [difference(gradients[name], dense[name]) for name in dense]
            worst.setdefault((dtype, sequence_parallel), []).append(max(apart))
    worst = {key: max(values) for key, values in worst.items()}
    print(worst)
    for (dtype, _), apart in worst.items():
        assert apart <= {"fp32": 1e-5, "bf16": 1e-2}[dtype], worst
