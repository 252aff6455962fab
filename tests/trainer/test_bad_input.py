"""Bad input ends in one or two lines and status 1 or 2, before anything is compiled or written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import LLAMA3, save_adapter, save_llama
from trainer.config_derived import SAMPLE


def refused(tmp_path, *flags, world_size=1, model=None):
    """The error of preparing a run in this process; nothing may have been written."""
    from trainer.config import Config, parse
    from trainer.job import prepare

    output = tmp_path / "out"
    given = [
        "--output_dir",
        output,
        "--max_seq_length",
        "64",
        *(["--model_id", model] if model else []),
        *flags,
    ]
    config = parse(list(map(str, given)))
    assert isinstance(config, Config)
    with pytest.raises(ValueError) as caught:
        prepare(config, world_size)
    assert not output.exists()
    message = str(caught.value)
    assert message.count("\n") == 0 and len(message) < 500
    return message


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    """Apply `change(tensors)` to the file that holds the first layer's q_proj."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def test_topology(tmp_path, base):
    assert "world size 6 is not divisible by --tensor_parallel_size 4" in refused(
        tmp_path, "--tensor_parallel_size", 4, world_size=6
    )
    save_llama(tmp_path / "six", hidden_size=96, num_attention_heads=24, num_key_value_heads=6)
    assert (
        "num_key_value_heads 6 neither divides the tensor parallel size 4 nor is divisible by it"
        in refused(tmp_path, "--tensor_parallel_size", 4, world_size=4, model=tmp_path / "six")
    )
    assert "num_attention_heads 8 is not divisible by the tensor parallel size 3" in refused(
        tmp_path, "--tensor_parallel_size", 3, world_size=3, model=base
    )
    for stages, world_size, problem in [
        (4, 6, "world size 6 is not divisible by --tensor_parallel_size 1 x --pipeline_parallel_size 4"),
        (4, 4, "num_hidden_layers 3 is less than --pipeline_parallel_size 4"),
    ]:
        assert problem in refused(
            tmp_path, "--pipeline_parallel_size", stages, world_size=world_size, model=base
        )
    assert "--global_batch_size 6 is not divisible by 4" in refused(
        tmp_path, "--global_batch_size", 6, world_size=4
    )


def test_model(tmp_path, copy):
    assert "no such directory" in refused(tmp_path, model="./nowhere")
    assert "more than the model's positions (max_position_embeddings 512)" in refused(
        tmp_path, "--max_seq_length", 1024, model=copy
    )
    edit_config(copy, architectures=["GPT2LMHeadModel"])
    assert "architecture is ['GPT2LMHeadModel']" in refused(tmp_path, model=copy)
    edit_config(
        copy, architectures=["LlamaForCausalLM"], rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    )
    assert "rope_scaling of type 'dynamic'" in refused(tmp_path, model=copy)
    edit_config(copy, model_type="nonsense", rope_scaling=None)
    assert "not the config of a known model architecture" in refused(tmp_path, model=copy)
    edit_config(copy, model_type="llama")
    for changes, problem in [
        ({"hidden_size": "64"}, "hidden_size is '64'; an integer above 0 was expected"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "by num_key_value_heads 3"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; an object was expected"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.0}}, "rope_scaling.factor is 0.0"),
    ]:
        original = (copy / "config.json").read_text()
        edit_config(copy, rope_parameters=None, **changes)
        assert problem in refused(tmp_path, model=copy)
        (copy / "config.json").write_text(original)
    (copy / "tokenizer.json").unlink()
    assert "has neither tokenizer.json nor tokenizer.model" in refused(tmp_path, model=copy)
    (copy / "config.json").unlink()
    assert "has no config.json" in refused(tmp_path, model=copy)


def test_weights(tmp_path, copy):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(copy, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert "the weight extra is not part of the model" in refused(tmp_path, model=copy)
    edit_weights(copy, lambda tensors: (tensors.pop("extra"), tensors.update({name: torch.zeros(64, 65)})))
    assert f"the weight {name} has shape [64, 65]; the config asks for [64, 64]" in refused(
        tmp_path, model=copy
    )
    edit_weights(copy, lambda tensors: tensors.update({name: torch.zeros(64, 64, dtype=torch.int8)}))
    assert f"the weight {name} is of type I8" in refused(tmp_path, model=copy)
    file = edit_weights(copy, lambda tensors: tensors.pop(name))
    assert f"lists {name} in {file.name}, which does not hold it" in refused(tmp_path, model=copy)
    (copy / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path, model=copy)
    shutil.copy(file, copy / "model.safetensors")
    assert "is missing (and" in refused(tmp_path, model=copy)
    (copy / "model.safetensors").write_bytes(file.read_bytes()[:-7])
    assert "model.safetensors is damaged: it has" in refused(tmp_path, model=copy)


def test_output(tmp_path):
    from trainer.config import parse
    from trainer.job import prepare

    (tmp_path / "file").touch()
    for output, problem in [
        ("file", "is a file"),
        ("file/x", "cannot be made: Not a directory"),
        ("x" * 300, "name too long"),
    ]:
        with pytest.raises(ValueError, match=problem):
            prepare(parse(["--output_dir", str(tmp_path / output), "--max_seq_length", "64"]), 1)


def test_lora(tmp_path, base):
    message = refused(tmp_path, "--lora_target_modules", "q_proj,qkv", model=base)
    assert "no linear layer 'qkv'; it has down_proj, gate_proj, k_proj, lm_head, o_proj" in message
    assert "has no adapter_config.json" in refused(tmp_path, "--adapter_name_or_path", base, model=base)
    edit = tmp_path / "adapter"
    save_adapter(save_llama(tmp_path / "scratch"), edit, ["q_proj"])
    settings = json.loads((edit / "adapter_config.json").read_text())
    (edit / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    assert "only plain LoRA is read" in refused(tmp_path, "--adapter_name_or_path", edit, model=base)


def test_data(tmp_path):
    path = tmp_path / "records.jsonl"
    good = json.dumps({"instruction": "a", "response": "b"})
    for line, problem in [
        (json.dumps({"instruction": "a"}), f"{path}:3: the field 'response' is missing"),
        (json.dumps({"instruction": "a", "response": 3}), f"{path}:3: the field 'response' is int"),
        (json.dumps({"instruction": "a", "response": " "}), f"{path}:3: the field 'response' is empty"),
        ('{"instruction": ', f"{path}:3: invalid JSON"),
        ("[1]", f"{path}:3: an object"),
    ]:
        path.write_text(f"{good}\n\n{line}\n")
        assert problem in refused(tmp_path, "--dataset", path)
    path.write_bytes(good.encode() + b"\n\xff\n")
    assert f"{path}:2: invalid UTF-8" in refused(tmp_path, "--dataset", path)
    path.write_text("\n")
    assert "the data set is empty" in refused(tmp_path, "--dataset", path)
    assert "no such file" in refused(tmp_path, "--dataset", tmp_path / "none.jsonl")
    path.write_text(json.dumps({"instruction": "a" * 900, "response": "b"}))
    for flags in ((), ("--skip_bad",)):
        assert (
            "no example has a target token within --max_seq_length 64: nothing is left to train on; raise it"
            in refused(tmp_path, "--dataset", path, *flags)
        )
    path.write_text(good)
    assert "at least two examples with prompts" in refused(tmp_path, "--dataset", path, "--do_eval")


def test_merging(tmp_path):
    from tools.merge_checkpoint.merging import merge

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for output, problem in [
        ("full", "full exists already"),
        ("full/kept", "kept exists already"),
        ("new", "no complete"),
    ]:
        with pytest.raises(ValueError, match=problem):
            merge(tmp_path / "none", tmp_path / output)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--stochastic_rounding"], "pass --bf16 too"),
        (
            ["--dataset", "a", "b", "--dataset_weights", "1"],
            "--dataset_weights has 1 numbers for 2 data sets",
        ),
        (["--dataset_weights", "0"], "numbers above 0"),
        (["--max_samples", "0"], "at least 1"),
        (["--long_examples", "drop"], "invalid choice: 'drop'"),
        (
            ["--sequence_parallel", "--tensor_parallel_size", "3"],
            "1024 is not divisible by --tensor_parallel_size 3",
        ),
        (["--gradient_checkpointing", "some"], "invalid choice: 'some'"),
        (["--pipeline_parallel_size", "0"], "--pipeline_parallel_size 0: at least 1"),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], "choose one of them"),
        (["--preset", "llama9"], "smollm3-3b, or a file of flags, was expected"),
        (["--depth_scaled_init", "--model_id", "x"], "pass --random_weights too"),
        (
            ["--num_microbatches", "2", "--per_device_train_batch_size", "3"],
            "3 is not divisible by --num_microbatches 2",
        ),
        (["--gradient_accumulation_steps", "0"], "at least 1"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--lr_scheduler_type", "magic"], "magic"),
        (["--bf16", "perhaps"], "perhaps"),
        (["--lora_dropout", "1"], "below 1"),
        (["--learning_rate", "nan"], "fp32"),
        (["--weight_decay", "1e39"], "fp32"),
        (["--max_steps", "1.5"], "invalid int"),
        (["--num_train_epochs", "0"], "above 0"),
        (["--stall_minutes", "0"], "--stall_minutes 0.0: a number above 0 was expected"),
        (["--on_stall", "wait"], "wait"),
    ],
)
def test_flags(flags, problem, capsys):
    from trainer.config import parse

    with pytest.raises(SystemExit) as caught:
        parse(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_booleans_as_hugging_face_takes_them():
    from trainer.config import parse

    assert parse(["--bf16"]).bf16 and parse(["--bf16", "true"]).bf16 and not parse(["--bf16", "false"]).bf16
    assert not parse(["--packing", "false"]).packing
    for flags, divides in (
        ([], True),
        (["--sequence_parallel", "false"], False),
        (["--sequence_parallel"], True),
        (["--max_seq_length", "255"], False),
        (["--tensor_parallel_size", "1"], False),
    ):
        assert parse(["--tensor_parallel_size", "2", *flags]).divides_sequence is divides
    for flags, mode in (
        ([], "none"),
        (["--gradient_checkpointing"], "full"),
        (["--gradient_checkpointing", "false"], "none"),
        (["--gradient_checkpointing", "selective", "--bf16"], "none"),
    ):
        assert parse(flags).checkpointing_mode == mode
    assert parse([]).datasets == [str(SAMPLE / "instructions.jsonl")]
    assert parse(["--dataset", "a", "b", "--dataset_weights", "1", "0.5"]).dataset_weights == [1.0, 0.5]
