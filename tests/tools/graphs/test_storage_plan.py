"""What the plan says of start, save and resume, beside what a small job reads and writes."""

import json
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

from data.loader import Position
from data.tokens import tokenize
from model.weights.loading import fill
from model.weights.safetensors_file import TensorFile, TensorWriter
from model.weights.shapes import base_shapes
from model.weights.sources import SafetensorsFiles
from parallel.buckets import Buckets
from parallel.mesh import Mesh
from parallel.shard import named_shards
from tests.support.saved import TOKENIZER, each_rank, job_of
from tests.tools.graphs.test_plan import counted
from tools.graphs.models import rank_model, read_model
from tools.plan import __main__ as plan
from tools.plan.file_systems import FILE_SYSTEMS, FileSystem, describe_storage
from tools.plan.storage import TOKEN_BYTES, Moved, storage_of
from trainer.checkpoint.writer import Saver
from trainer.config import Config
from trainer.config_derived import SAMPLE

TINY = read_model("tiny")
CORES = 2  # of a node
FULL = {"lora_r": 0}
TOPOLOGIES = [
    {"tensor_parallel_size": 2, "world_size": 4, **FULL},
    {"tensor_parallel_size": 2, "world_size": 4, "zero_1": True, **FULL},
    {"world_size": 6, "zero_1": True, **FULL},  # parts that are not equal
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "world_size": 8, "zero_1": True, **FULL},
    {"tensor_parallel_size": 4, "world_size": 4},  # LoRA, and a replica group over two nodes
    {"pipeline_parallel_size": 2, "world_size": 4},
]


def each_model(config):
    """(rank, model) of each rank."""
    for rank in range(config.world_size):
        sizes = config.tensor_parallel_size, config.pipeline_parallel_size
        mesh = Mesh.create(rank, config.world_size, *sizes)
        yield rank, rank_model(config, TINY, mesh)


@pytest.mark.parametrize("flags", TOPOLOGIES)
def test_what_a_save_writes(flags, tmp_path):
    config, copies = Config(**flags), Counter()

    def save(runtime, mesh):
        model = rank_model(config, TINY, mesh)
        trained = [each for each in named_shards(model) if each[1].requires_grad]
        buckets = Buckets(trained, mesh, config.zero_1)
        state = [torch.zeros(1, columns) for _, columns in buckets.shapes]
        optimizer = SimpleNamespace(buckets=buckets, weights=state, exp_avg=state, exp_avg_sq=state)
        saver = Saver(runtime, mesh, job_of(tmp_path, **flags), optimizer)
        saver.save(Position(1, 0, 0))
        saver.wait()
        if runtime.rank in saver._writers:
            copies[runtime.rank // CORES] += 3 * sum(value.nbytes for value in state)

    pp, tp = config.pipeline_parallel_size, config.tensor_parallel_size
    each_rank(save, tp, config.world_size // tp // pp, pp)
    sizes, files = Counter(), sorted((tmp_path / "checkpoint-1").glob("rank-*.safetensors"))
    for path in files:
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        sizes[int(path.name[5:10]) // CORES] += path.stat().st_size - header
    planned = storage_of(config, TINY, CORES)
    assert planned.saved == Moved(sizes.total(), max(sizes.values()), max(sizes.values()))
    assert planned.resumed.total == sizes.total() and planned.files == len(files)
    assert planned.copy == max(copies.values())
    manifest = (tmp_path / "checkpoint-1" / "manifest.json").stat().st_size
    assert planned.manifest == pytest.approx(manifest, abs=5000, rel=0.1)  # the rest does not grow with ranks


@pytest.mark.parametrize("flags", TOPOLOGIES)
def test_what_a_start_reads(flags, tmp_path, monkeypatch):
    """Each rank fills its model; a node reads what its ranks ask for, each byte once."""
    shapes = {name: (torch.bfloat16, shape) for name, shape in base_shapes(TINY).items()}
    TensorWriter(tmp_path / "model.safetensors", shapes, {}).close()
    weights, elements = SafetensorsFiles(tmp_path), TensorFile.elements
    asked, read, reader = Counter(), defaultdict(set), SimpleNamespace(node=0)

    def counted_elements(file, name, first, count):
        asked[reader.node] += 2 * count
        read[reader.node].update((name, number) for number in range(first, first + count))
        return elements(file, name, first, count)

    monkeypatch.setattr(TensorFile, "elements", counted_elements)
    config = Config(**flags)
    for rank, model in each_model(config):
        reader.node = rank // CORES
        fill(model, weights, "cpu", seed=0)
    once = [2 * len(each) for each in read.values()]
    planned = storage_of(config, TINY, CORES)
    assert planned.base == Moved(sum(once), max(once), max(asked.values()))
    assert planned.hashed.total == 2 * sum(torch.Size(shape).numel() for _, shape in shapes.values())
    assert (planned.frozen == planned.base) if config.lora_r else (planned.frozen.total == 0)
    assert storage_of(Config(**flags, random_weights=True), TINY, CORES).hashed.total == 0


def test_tokens_have_their_bytes(tmp_path):
    tokens = tokenize(str(SAMPLE / "instructions.jsonl"), TOKENIZER, cache=tmp_path)
    arrays = [tokens.directory / f"{name}.bin" for name in ("input_ids", "trained")]
    assert sum(path.stat().st_size for path in arrays) == TOKEN_BYTES * len(tokens.input_ids)


def test_llama_3_8b_by_hand():
    """Full training with ZeRO-1 on 64 nodes: 8.03e9 parameters, 12 bytes each in a checkpoint."""
    config = Config(world_size=2048, tensor_parallel_size=8, zero_1=True, bf16=True, **FULL)
    planned, parameters = storage_of(config, read_model("llama3-8b"), 32), 8_030_261_248
    assert planned.saved.total == 12 * parameters and planned.files == 2048
    assert planned.base.node == 2 * parameters and planned.base.total == 64 * planned.base.node
    assert planned.base.asked == pytest.approx(4 * planned.base.node, rel=1e-3)  # and norms eight times
    assert planned.saved.node == pytest.approx(planned.saved.total / 64, rel=1e-3)


def test_seconds_of_a_file_system():
    system, moved = FileSystem(read=10.0, write=5.0, node=1.0), Moved(total=100, node=8, asked=30)
    assert (system.seconds(moved), system.seconds(moved, writes=True)) == (10, 20)
    assert FileSystem(100.0, 100.0, 1.0).seconds(moved) == 8


def test_the_plan_says_what_moves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "reports", lambda configs, model: list(counted(configs, model)))
    out = tmp_path / "plan.json"
    flags = ["--model", "tiny", "--tensor_parallel_size", "8", "--nodes", "2", "--json", str(out)]
    assert plan.main(flags) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())["storage"]
    planned = storage_of(Config(tensor_parallel_size=8, world_size=64), TINY, 32)
    assert describe_storage(planned, FILE_SYSTEMS) in said and found["saved"] == vars(planned.saved)
    assert set(found["seconds"]) == set(FILE_SYSTEMS) and "save: write the checkpoint" in said
    assert plan.main([*flags, "--storage_gbps", "2"]) == 0
    found = json.loads(out.read_text())["storage"]
    assert found["seconds"]["2 GB/s"]["saved"] == planned.saved.total / 2e9 and len(found["seconds"]) == 1
    assert plan.main([*flags, "--storage_gbps", "0"]) == 1
    assert "error: --storage_gbps 0.0: GB/s above 0 were expected" in capsys.readouterr().err
