"""Presets, and the global batch, which is the same on every cluster."""

import pytest

from model.llama import check_divisible
from parallel.mesh import Mesh
from tools.graphs.models import PRESETS as MODELS
from tools.graphs.models import read_model
from trainer.command_line import PRESETS, read_preset
from trainer.config import Config, parse


def test_presets_are_the_flags_of_the_published_jobs():
    seen = {path.stem: parse(["--preset", path.stem]) for path in PRESETS.glob("*.txt")}
    assert set(seen) - set(MODELS) == {"dolly-llama3-8b", "hyperpod-llama3-8b"}
    job, dolly = seen["hyperpod-llama3-8b"], seen["dolly-llama3-8b"]
    assert (job.tensor_parallel_size, job.max_seq_length, job.learning_rate, job.global_batch_size) == (
        8,
        8192,
        1.5e-4,
        1024,
    )
    assert job.random_weights and job.zero_1 and job.bf16 and job.lora_r == 0
    assert job.checkpointing_mode == "none"
    assert (
        job.for_ranks(4).gradient_accumulation_steps == 256
        and job.for_ranks(16).gradient_accumulation_steps == 64
    )
    assert dolly.dataset == ["databricks/databricks-dolly-15k"] and (dolly.lora_r, dolly.lora_alpha) == (
        16,
        32.0,
    )
    assert dolly.learning_rate == 5e-5 and dolly.gradient_accumulation_steps == 2
    assert dolly.checkpointing_mode == "full"


@pytest.mark.parametrize("path", [path for path in PRESETS.glob("*.txt") if path.stem in MODELS], ids=str)
def test_a_models_preset_names_it_and_divides_it(path):
    """Its name is bench_compile's, whose configuration the tensor parallel ranks can divide."""
    config, model = parse(["--preset", path.stem]), read_model(path.stem)
    assert path.stem in config.model_id.lower().replace("-instruct", "").replace("llama-", "llama")
    check_divisible(model, Mesh.create(0, config.tensor_parallel_size, config.tensor_parallel_size).tp)
    assert config.max_seq_length <= model.max_positions


def test_the_command_line_wins(tmp_path):
    config = parse(["--learning_rate", "1e-5", "--preset=hyperpod-llama3-8b", "--random_weights", "false"])
    assert config.learning_rate == 1e-5 and not config.random_weights and config.max_steps == 10000
    mine = tmp_path / "mine.txt"
    mine.write_text("--dataset 'a b.txt' c.txt   # two\n--seed 3\n")
    assert parse(["--preset", str(mine), "--seed", "4"]) == Config(
        preset=str(mine), dataset=["a b.txt", "c.txt"], seed=4
    )
    with pytest.raises(
        ValueError, match="--preset none: dolly-llama3-8b, granite-3.3-8b, .*, smollm3-3b, or a file of flags"
    ):
        read_preset("none")


def test_the_global_batch_is_that_of_all_ranks():
    config = parse(["--global_batch_size", "24", "--per_device_train_batch_size", "2"])
    assert [config.for_ranks(ranks).gradient_accumulation_steps for ranks in (1, 3, 12)] == [12, 4, 1]
    with pytest.raises(
        ValueError, match="--global_batch_size 24 is not divisible by 10, the --per_device_train"
    ):
        config.for_ranks(5)
    assert parse([]).for_ranks(7) == parse([])
