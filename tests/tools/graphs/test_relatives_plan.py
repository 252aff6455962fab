"""bench_compile and plan of Llama's relatives: FLOPs with windows, and extrapolated layers."""

import json

import pytest

from model.attention.blockwise import first_key
from model.config import ModelConfig
from tests.support.on_ranks import run_program
from tests.tools.graphs.test_bench_compile import PROGRAM
from tests.tools.graphs.test_plan import forked_traces  # noqa: F401  (a fixture)
from tools.graphs.models import PRESETS, read_model
from tools.plan import extrapolate
from trainer.config import Config

pytestmark = pytest.mark.process

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
WINDOW = SIZES | {"use_sliding_window": True, "sliding_window": 128}
MODELS = {
    "full": SIZES | {"model_type": "mistral", "sliding_window": None},
    "window": SIZES | {"model_type": "mistral", "sliding_window": 128},
    "window of some layers": WINDOW | {"model_type": "qwen3", "head_dim": 32, "max_window_layers": 1},
    "window of some stages": WINDOW | {"model_type": "qwen2", "max_window_layers": 1},
    "granite": SIZES | {"model_type": "granite", "attention_multiplier": 0.1, "logits_scaling": 4.0},
    "smollm3": SIZES | {"model_type": "smollm3", "no_rope_layers": [1, 0]},
}
FLAGS = {
    "window of some stages": "--pipeline_parallel_size 2 --per_device_train_batch_size 2",
    "granite": "--lora_r 0 --gradient_checkpointing full",
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory, lines = tmp_path_factory.mktemp("relatives"), []
    for name, settings in MODELS.items():
        model = directory / name
        model.mkdir()
        (model / "config.json").write_text(json.dumps(settings))
        flags = f"--world_size 4 --tensor_parallel_size 2 --max_seq_length 1024 {FLAGS.get(name, '')}"
        lines.append(["--model", str(model), "--json", str(model / "report.json"), *flags.split()])
    done = run_program(["-c", PROGRAM, json.dumps(lines), str(directory)])
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((directory / name / "report.json").read_text()) for name in MODELS}


def test_products_are_those_of_the_formula(reports):
    assert {name: reports[name]["step_flops"] for name in MODELS} == {
        name: reports[name]["formula_flops"] for name in MODELS
    }


def test_a_window_leaves_out_the_keys_that_it_hides(reports):
    """By hand: a row of 1024 is two blocks of 512 queries, of which the second sees keys from 512 - 127 on,
    from 384 with what is cut at a multiple of 128."""
    assert first_key(512, 128) == 384 and first_key(512, 0) == 0 and first_key(0, 128) == 0
    product = 2 * 2 * 16  # of a pair of positions: two heads on a rank
    saved = product * 512 * 384
    # Seven products of a layer with LoRA: its backward computes the scores again.
    assert reports["full"]["step_flops"] - reports["window"]["step_flops"] == 2 * 7 * saved


def test_layers_of_a_period_are_extrapolated(monkeypatch, forked_traces):  # noqa: F811
    """SmolLM3's every fourth layer is another one: traces of 4 and 8 layers a stage, beside one of all 12."""
    settings = MODELS["smollm3"] | {"num_hidden_layers": 24, "no_rope_layers": None}
    config = Config(tensor_parallel_size=2, pipeline_parallel_size=2, max_seq_length=128, world_size=4)
    model = ModelConfig.from_settings(settings)
    assert extrapolate._depths(model, config) == (4, 8)
    (extrapolated,) = extrapolate.reports([config], model)
    monkeypatch.setattr(extrapolate, "DEPTHS", (12,))
    (whole,) = extrapolate.reports([config], model)
    for name, graph in whole["graphs"].items():
        for key in ("runs_per_step", "dot_flops", "outputs", "output_bytes", "collectives"):
            assert extrapolated["graphs"][name][key] == graph[key], (name, key)
        assert extrapolated["graphs"][name]["instructions"] == pytest.approx(graph["instructions"], rel=1e-3)


def test_layers_without_a_period_are_all_traced():
    settings = WINDOW | {"model_type": "qwen2", "num_hidden_layers": 9, "max_window_layers": 5}
    assert extrapolate._depths(ModelConfig.from_settings(settings), Config(world_size=1)) == (9,)
    assert extrapolate._depths(read_model("qwen3-8b"), Config(world_size=1)) == (2, 4)


def test_presets_are_written_as_they_are_read():
    for name in PRESETS:
        assert ModelConfig.from_settings(read_model(name).settings()) == read_model(name), name
