"""Logits against transformers', from the same files."""
import pytest
import torch

from tests.models import save_llama
from tests.on_ranks import on_ranks


def forward(runtime, directory, tp, rows):
    """The logits of the whole vocabulary for rows {input_ids, position_ids, segment_ids}, through model/weights.py."""
    from pathlib import Path

    from model.llama import Llama, LlamaConfig
    from model.weights import SafetensorsFiles, check_weights, fill
    from parallel.collectives import all_gather
    from parallel.mesh import Mesh
    mesh = Mesh.create(runtime.rank, runtime.world_size, tp)
    config = LlamaConfig.from_pretrained(Path(directory))
    model = Llama(config, mesh.tp)
    files = SafetensorsFiles(Path(directory))
    check_weights(config, files)
    fill(model, mesh.tp, files, runtime.device, seed=0)
    with torch.no_grad():
        batch = [torch.tensor(rows[name]).to(runtime.device) for name in ("input_ids", "position_ids", "segment_ids")]
        logits = all_gather(model(*batch), mesh.tp, -1)
    runtime.mark_step()
    return logits.cpu(), runtime.compilations()


def packed(examples, length):
    """One row of token lists: ids, positions, segments, padded."""
    row = {"input_ids": [], "position_ids": [], "segment_ids": []}
    for number, example in enumerate(examples, 1):
        row["input_ids"] += example
        row["position_ids"] += range(len(example))
        row["segment_ids"] += [number] * len(example)
    return {name: [values + [0] * (length - len(values))] for name, values in row.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_packed_logits_are_those_of_transformers_for_each_example_alone(tmp_path, tied):
    reference = save_llama(tmp_path, tied)
    assert (tmp_path / "model.safetensors.index.json").exists()
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (90, 7, 31)]
    for tp in (1, 2, 4):
        results = on_ranks(forward, tp, directory=str(tmp_path), tp=tp, rows=packed(examples, 144))
        assert all(compilations == 1 for _, compilations in results)
        for logits, _ in results:
            start = 0
            for example in examples:
                with torch.no_grad():
                    alone = reference(torch.tensor([example])).logits[0]
                torch.testing.assert_close(logits[0, start:start + len(example)], alone, rtol=0, atol=1e-4)
                start += len(example)


def test_an_example_in_a_packed_row_has_the_logits_that_it_has_alone(tmp_path):
    save_llama(tmp_path)
    generator = torch.Generator().manual_seed(2)
    examples = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (33, 80, 11)]
    together = on_ranks(forward, 2, directory=str(tmp_path), tp=2, rows=packed(examples, 128))[0][0]
    start = 0
    for example in examples:
        alone = on_ranks(forward, 2, directory=str(tmp_path), tp=2, rows=packed([example], 128))[0][0]
        torch.testing.assert_close(together[0, start:start + len(example)], alone[0, :len(example)], rtol=0, atol=1e-5)
        start += len(example)
