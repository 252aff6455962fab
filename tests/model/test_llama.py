"""Logits against transformers', from the same files."""

import pytest
import torch

from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks

pytestmark = pytest.mark.process


def forward(runtime, directories, tensor_parallel_sizes, rows):
    """[({tp: logits of the whole vocabulary}, compilations)] of the model in each directory.

    The rows {input_ids, position_ids, segment_ids} go through a model that model/weights/sources.py has read.
    """
    from pathlib import Path

    from model.config import ModelConfig
    from model.llama import Llama
    from model.weights.loading import check_weights, fill
    from model.weights.sources import SafetensorsFiles
    from parallel.collectives import all_gather
    from parallel.mesh import Mesh

    found, before = [], 0
    for directory in map(Path, directories):
        config, files, logits_of = ModelConfig.from_pretrained(directory), SafetensorsFiles(directory), {}
        check_weights(config, files)
        for tp in tensor_parallel_sizes:
            mesh = Mesh.create(runtime.rank, runtime.world_size, tp)
            model = Llama(config, mesh.tp)
            fill(model, files, runtime.device, seed=0)
            with torch.no_grad():
                batch = [
                    torch.tensor(rows[name]).to(runtime.device)
                    for name in ("input_ids", "position_ids", "segment_ids")
                ]
                logits = all_gather(model(*batch), mesh.tp, -1)
            runtime.mark_step()
            logits_of[tp] = logits.cpu()
        found.append((logits_of, runtime.compilations() - before))
        before += found[-1][1]
    return found


def packed(*rows, length):
    """Rows of token lists: ids, positions, segments, padded."""
    batch = {"input_ids": [], "position_ids": [], "segment_ids": []}
    for examples in rows:
        row = {"input_ids": [], "position_ids": [], "segment_ids": []}
        for number, example in enumerate(examples, 1):
            row["input_ids"] += example
            row["position_ids"] += range(len(example))
            row["segment_ids"] += [number] * len(example)
        for name, values in row.items():
            batch[name].append(values + [0] * (length - len(values)))
    return batch


MODELS = {
    "gqa, llama3 rope scaling": {},
    "tied": {"tied": True},
    "biases, head_dim of its own": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{model: (transformers' model, the examples, ({tp: logits}, compilations) of each rank)}."""
    directories = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    references = [save_llama(directories[name], **changes) for name, changes in MODELS.items()]
    assert all(len(list(each.glob("model-*.safetensors"))) > 1 for each in directories.values())
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (90, 7, 31)]
    ranks = on_ranks(
        forward,
        4,
        directories=[str(each) for each in directories.values()],
        tensor_parallel_sizes=[1, 2, 4],
        rows=packed(examples, *([example] for example in examples), length=144),
    )
    found = zip(references, [examples] * len(MODELS), zip(*ranks, strict=True), strict=True)
    return dict(zip(MODELS, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_for_each_example_alone(models, name):
    """Three examples packed into one row, and each alone in a row: both as transformers has it, at tp 1, 2
    and 4."""
    reference, examples, ranks = models[name]
    for logits_of, compilations in ranks:
        assert compilations == 3
        for tp, logits in logits_of.items():
            start = 0
            for number, example in enumerate(examples, 1):
                together, alone = logits[0, start : start + len(example)], logits[number, : len(example)]
                with torch.no_grad():
                    expected = reference(torch.tensor([example])).logits[0]
                torch.testing.assert_close(
                    together, expected, rtol=0, atol=1e-4, msg=lambda text, tp=tp: f"tp {tp}: {text}"
                )
                torch.testing.assert_close(
                    together, alone, rtol=0, atol=1e-5, msg=lambda text, tp=tp: f"tp {tp}: {text}"
                )
                start += len(example)
