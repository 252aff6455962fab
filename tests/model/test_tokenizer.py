"""Tokenizers as transformers 4 and 5 save them give the same tokens, and an error says what is wrong."""

import json
import shutil

import pytest

from trainer.config_derived import SAMPLE
from trainer.tokenizer import load_tokenizer

TEXT = "What is 2+2? <|turn|>  It's\n4.</s>"
# What transformers 5.24 writes for the sample's tokenizer with one token more; 4.57 writes the other one.
BY_5 = {
    "backend": "tokenizers",
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "extra_special_tokens": ["<|turn|>"],
    "is_local": True,
    "model_max_length": 2048,
    "pad_token": "<pad>",
    "tokenizer_class": "TokenizersBackend",
}
BY_4 = {
    "additional_special_tokens": ["<|turn|>"],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "extra_special_tokens": {},
    "model_max_length": 2048,
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


@pytest.fixture
def directory(tmp_path):
    """The sample's tokenizer with a special token more, without its settings."""
    file = json.loads((SAMPLE / "tiny" / "tokenizer.json").read_text())
    file["added_tokens"].append(file["added_tokens"][-1] | {"id": 512, "content": "<|turn|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    shutil.copy(SAMPLE / "tiny" / "config.json", tmp_path)
    return tmp_path


def settings(directory, **values):
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "saved", [BY_4, BY_5, BY_5 | {"tokenizer_class": "PreTrainedTokenizerFast"}], ids=["4", "5", "mixed"]
)
def test_both_forms_give_the_same_tokens(directory, saved):
    settings(directory, **saved)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and ids.count(512) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "What is 2+2?   It's\n4."
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert set(tokenizer.all_special_tokens) == {"<s>", "</s>", "<pad>", "<|turn|>"}


def test_what_was_saved_is_loaded_again(directory, tmp_path):
    """As a checkpoint and a merged model keep it."""
    settings(directory, **BY_5)
    load_tokenizer(directory).save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again(TEXT)["input_ids"] == load_tokenizer(directory)(TEXT)["input_ids"]
    assert "<|turn|>" in again.all_special_tokens


@pytest.mark.parametrize(
    "file, damage, problem",
    [
        ("tokenizer.json", lambda text: text[:-40], "tokenizer.json is damaged: "),
        ("tokenizer.json", lambda text: "[]", "tokenizer.json is damaged: a JSON object was expected"),
        ("tokenizer.json", lambda text: text.replace('"BPE"', '"Nonsense"'), "did not match any variant"),
        ("tokenizer_config.json", lambda text: text[:-4], "tokenizer_config.json is damaged: "),
    ],
)
def test_an_error_is_the_real_one(directory, file, damage, problem):
    settings(directory, **BY_4)
    path = directory / file
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=problem) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)
    assert "protobuf" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_of_a_later_version_is_named(directory):
    settings(directory, **BY_4 | {"tokenizer_class": "FutureBackend"})
    try:
        assert load_tokenizer(directory)(TEXT)["input_ids"].count(512) == 1  # where tokenizer.json is enough
    except ValueError as error:
        assert "FutureBackend" in str(error)
