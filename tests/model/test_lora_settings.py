"""LoRA's targets mean what they mean in peft, and an adapter that cannot be read is not blamed on flags."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraLinear, add_lora
from tests.support.models import save_adapter, save_llama
from trainer.config import ALL_LINEAR, Config
from trainer.lora_settings import count_parameters, lora_config, read_adapter, trained_summary


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_llama(directory)
    return directory


def ours(base, text):
    """The names of the modules that get an update by --lora_target_modules."""
    config = ModelConfig.from_pretrained(base)
    model = Llama(config)
    add_lora(model, lora_config(Config(lora_target_modules=text), config))
    return {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def of_peft(base, targets):
    """The same, where peft gets the text as its target_modules."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM")).base_model.model
    return {name for name, module in model.named_modules() if isinstance(module, Linear)}


@pytest.mark.parametrize(
    "text",
    [
        "all-linear",
        "ALL-Linear",
        r".*\.(q|v)_proj",
        r"model\.layers\.[02]\.mlp\..*_proj",
        r".*layers\.\d{1,2}\.self_attn\.(k_proj|o_proj)",
        r"(.*q_proj|lm_head)",
        r"(?!.*mlp).*_proj",
    ],
)
def test_a_text_means_what_it_means_in_peft(base, text):
    assert ours(base, text) == of_peft(base, text) and ours(base, text)


def test_names_mean_what_they_mean_in_a_list_of_peft(base):
    for names in (["q_proj", "lm_head"], ["model.layers.1.mlp.up_proj"], ["self_attn.o_proj", "down_proj"]):
        assert ours(base, ", ".join(names)) == of_peft(base, names)
    config = ModelConfig.from_pretrained(base)
    assert lora_config(Config(lora_target_modules="all-linear"), config) == lora_config(Config(), config)
    assert Config().lora_target_modules == ALL_LINEAR


@pytest.mark.parametrize(
    "text, problem",
    [
        ("q_proj,qkv", "the model has no linear layer 'qkv'; it has down_proj"),
        ("embed_tokens", "no linear layer 'embed_tokens'"),
        (r".*qkv", "matches the whole name of no module"),
        ("q_proj|v_proj", "matches the whole name of no module"),  # so it is in peft
        (".*self_attn.*", "it matches model.layers.0.self_attn, which is no linear layer"),
        (".*(embed_tokens|q_proj)", "it matches model.embed_tokens, which is no linear layer"),
        ("(q_proj", "neither names nor a regular expression: missing"),
        ("['q_proj']", "matches the whole name of no module"),
        (" , ", "names no module"),
    ],
)
def test_other_texts_are_refused(base, text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        lora_config(Config(lora_target_modules=text), ModelConfig.from_pretrained(base))
    assert str(caught.value).startswith("--lora_target_modules")


def with_tokens(directory):
    """An adapter of a model to which two tokens were added; peft saves the embedding and head beside it."""
    model = save_llama(directory / "base")
    model.resize_token_embeddings(514)
    save_adapter(model, directory / "adapter", ["q_proj"])
    file = directory / "adapter" / "adapter_model.safetensors"
    weights = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    save_file(load_file(file) | {name: torch.zeros(514, 64) for name in weights}, file)


def save(path, targets, **changes):
    save_adapter(save_llama(path / "base"), path / "adapter", targets, **changes)


def edit(path, **changes):
    """Change settings of the adapter."""
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path):
    """The error of reading the adapter for the model beside it."""
    with pytest.raises(ValueError) as caught:
        read_adapter(
            Config(adapter_name_or_path=str(path / "adapter")), ModelConfig.from_pretrained(path / "base")
        )
    message = str(caught.value)
    assert str(path / "adapter") in message and "--lora" not in message and "\n" not in message
    return message


ADAPTERS = {
    "whole weights": (
        lambda path: save(path, ["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        "modules_to_save is ['embed_tokens', 'lm_head']",
    ),
    "rows": (lambda path: save(path, ["q_proj"], trainable_token_indices=[3]), "trainable_token_indices is"),
    "the embedding": (lambda path: save(path, ["q_proj", "embed_tokens"]), "embed_tokens is a target"),
    "by a pattern": (lambda path: save(path, ".*(q_proj|embed_tokens)"), "lora_embedding_A"),
    "a larger vocabulary": (with_tokens, "holds base_model.model.lm_head.weight [514, 64]"),
}


@pytest.mark.parametrize("make, problem", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_with_more_than_factors_of_linear_layers(tmp_path, make, problem):
    make(tmp_path)
    message = refused(tmp_path)
    assert problem in message and "merge it into its base model with peft" in message


def test_an_adapter_whose_target_the_model_lacks(tmp_path):
    save(tmp_path, ["q_proj"])
    edit(tmp_path, target_modules=["q_proj", "query_key_value"])
    assert "adapter: the model has no linear layer 'query_key_value'" in refused(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"kasa_config": {"a": 1}}, {"new_of_peft": True}, {"init_lora_weights": "mica"}]
)
def test_settings_of_an_adapter_that_are_not_known(tmp_path, changes):
    save(tmp_path, ["q_proj"])
    edit(tmp_path, **changes)
    message = refused(tmp_path)
    assert "only plain LoRA is read" in message and next(iter(changes)) in message


def test_what_is_trained_is_what_peft_counts(base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = ModelConfig.from_pretrained(base)
    lora = lora_config(Config(lora_r=4, lora_target_modules="q_proj,down_proj"), config)
    model = AutoModelForCausalLM.from_pretrained(base)
    everything = model.num_parameters()
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    trained, parameters = model.get_nb_trainable_parameters()
    assert count_parameters(config, lora) == (trained, parameters)
    assert trained_summary(config, lora) == (
        f"trained: {trained:,} of {parameters:,} parameters ({100 * trained / parameters:.3f}%): "
        "LoRA of rank 4 on down_proj, q_proj"
    )
    assert trained_summary(config, None) == f"trained: all {everything:,} parameters"
