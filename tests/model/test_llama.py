"""Logits against transformers', from the same files."""

import pytest
import torch

from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks

pytestmark = pytest.mark.process


def forward(runtime, directory, tensor_parallel_sizes, rows):
    """{tp: logits of the whole vocabulary} for rows {input_ids, position_ids, segment_ids}, through
    model/weights/sources.py."""
    from pathlib import Path

    from model.config import ModelConfig
    from model.llama import Llama
    from model.weights.loading import check_weights, fill
    from model.weights.sources import SafetensorsFiles
    from parallel.collectives import all_gather
    from parallel.mesh import Mesh

    config = ModelConfig.from_pretrained(Path(directory))
    files = SafetensorsFiles(Path(directory))
    check_weights(config, files)
    found = {}
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
        found[tp] = logits.cpu()
    return found, runtime.compilations()


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


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers_for_each_example_alone(tmp_path, changes):
    """Three examples packed into one row, and each alone in a row: both as transformers has it, at tp 1, 2
    and 4."""
    reference = save_llama(tmp_path, **changes)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (90, 7, 31)]
    rows = packed(examples, *([example] for example in examples), length=144)
    for logits_of, compilations in on_ranks(
        forward, 4, directory=str(tmp_path), tensor_parallel_sizes=[1, 2, 4], rows=rows
    ):
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
