"""Answers token by token against transformers' generate, on every topology, from shards that are not merged
too."""

from pathlib import Path

import pytest
import torch

from model.sampling import GREEDY, Sampling
from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tests.support.saved import save

pytestmark = pytest.mark.process

LENGTHS = [3, 31, 32, 7, 20, 12, 33, 100, 64, 65]  # of the prompts
NEW, DRAWN = 64, 16
DRAWING = [
    Sampling(0.8, 20, 0.9, 1.3, 7),
    Sampling(1.0, 0, 1.0, 1.0, 3),
    Sampling(1.5, 5, 1.0, 1.0, 11),
    Sampling(0.0, 0, 1.0, 1.5, 0),
]


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]


def save_lora(directory: Path):
    """A base with GQA and llama3 rope scaling, and a checkpoint of random LoRA factors on it, saved by two
    ranks."""
    from model.config import ModelConfig
    from model.llama import Llama
    from model.lora import LoraConfig, add_lora
    from model.weights.shapes import base_shapes
    from model.weights.sources import SafetensorsFiles
    from parallel.mesh import Mesh
    from parallel.shard import named_shards

    base = directory / "base"
    save_llama(base, num_key_value_heads=2, num_hidden_layers=2)
    config = ModelConfig.from_pretrained(base)
    lora = {
        "r": 4,
        "lora_alpha": 0.1,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "use_rslora": False,
    }
    model = Llama(config, Mesh.create(0, 2, 2).tp)
    add_lora(model, LoraConfig(**lora))
    shapes = {
        name: (shard.global_shape, shard.dim)
        for name, parameter, shard in named_shards(model)
        if parameter.requires_grad
    }
    identity = {
        "base": SafetensorsFiles(base).fingerprint(base_shapes(config)),
        "lora": lora,
        "seed": 1,
        "data": "none",
    }
    return save(directory, 1, shapes=shapes, bucket_bytes=10**6, identity=identity, model=base)


def answers(runtime, merged, checkpoint, prompts):
    """{(source, tp): answers}, and how many graphs all of that was."""
    from model.generation import Generator, capacity_for
    from parallel.mesh import Mesh
    from tools.model_source import ModelSource

    found = {}
    for name, source in (
        ("merged", ModelSource.of_model(merged)),
        ("checkpoint", ModelSource.of_checkpoint(Path(checkpoint))),
    ):
        for tp in (1, 2, 4):
            group = Mesh.create(runtime.rank, runtime.world_size, tp).tp
            model = source.build(group, runtime.device, torch.float32, sequence_parallel=tp > 1)
            runtime.mark_step()
            generator = Generator(runtime, model, group, len(LENGTHS), capacity_for(max(LENGTHS), NEW, 512))
            found[name, tp] = generator.generate(prompts, NEW, set())
    return found, runtime.compilations()


def asked(reference, prompt, new, ends=None, sampling=None):
    """transformers' answer to one prompt, which stands alone: no padding."""
    how = {"do_sample": False}
    if sampling:
        how = {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
        if sampling.temperature:
            how |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = torch.tensor([prompt])
    output = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=ends, pad_token_id=0, **how
    )
    return output[0, len(prompt) :].tolist()


def test_every_topology_answers_as_transformers_does(tmp_path):
    from transformers import AutoModelForCausalLM

    from tools.merge_checkpoint.merging import merge

    checkpoint, merged = save_lora(tmp_path), tmp_path / "merged"
    merge(checkpoint, merged)
    reference, prompts = AutoModelForCausalLM.from_pretrained(merged).eval(), prompts_of(LENGTHS)
    expected = [asked(reference, prompt, NEW) for prompt in prompts]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert all(len(answer) == NEW for answer in expected)
    other = [asked(base, prompt, 8) != answer[:8] for prompt, answer in zip(prompts, expected, strict=True)]
    assert sum(other) > 5  # the factors do change what is said
    for found, compilations in on_ranks(
        answers, 4, merged=str(merged), checkpoint=str(checkpoint), prompts=prompts
    ):
        assert {key: answer == expected for key, answer in found.items()} == dict.fromkeys(found, True)
        assert compilations == 2 * 2 * 3  # prefill and decoding, of 2 sources at 3 sizes


def choices(runtime, directory, prompts, ends):
    """20 prompts in batches of 3 and the graphs that they took; then what is drawn, and where answers end."""
    from model.generation import Generator
    from parallel.mesh import Mesh
    from tools.model_source import ModelSource

    mesh = Mesh.create(0, 1)
    model = ModelSource.of_model(directory).build(mesh.tp, runtime.device, torch.float32)
    runtime.mark_step()
    runtime.watch_graphs("error")
    generator, told = Generator(runtime, model, mesh.tp, 3, 192), []
    before = runtime.compilations()
    greedy = generator.generate(prompts, 3, set(), on_token=lambda *token: told.append(token))
    drawn = [
        generator.generate(prompts[:2], DRAWN, set(), Sampling(*how)) for how in map(tuple, ends["drawing"])
    ]
    ended = generator.generate(prompts[:4], DRAWN, set(ends["ends"]), GREEDY)
    return greedy, told, drawn, ended, runtime.compilations() - before


def test_graphs_draws_and_ends(tmp_path):
    reference = save_llama(tmp_path)
    prompts = prompts_of([5 + 6 * number for number in range(20)])  # buckets of 32, 64 and 128
    long = [asked(reference, prompt, DRAWN) for prompt in prompts[:4]]
    ends = [long[0][5], long[2][9]]
    settings = [(how.temperature, how.top_k, how.top_p, how.repetition_penalty, how.seed) for how in DRAWING]
    [(greedy, told, drawn, ended, compilations)] = on_ranks(
        choices, 1, directory=str(tmp_path), prompts=prompts, ends={"ends": ends, "drawing": settings}
    )
    assert compilations == 3 + 1
    assert greedy == [asked(reference, prompt, 3) for prompt in prompts]
    assert [[token for number, token in told if number == prompt] for prompt in range(20)] == greedy
    for how, found in zip(DRAWING, drawn, strict=True):
        for number, answer in enumerate(found):
            torch.manual_seed(how.seed + number)
            assert answer == asked(reference, prompts[number], DRAWN, sampling=how), how
    for answer, prompt in zip(ended, prompts, strict=False):
        expected = asked(reference, prompt, DRAWN, ends)
        assert answer == (expected[:-1] if expected[-1] in ends else expected)
    assert len(ended[0]) == 5 and len(ended[2]) <= 9
