"""Records, their checks, and the tokens and labels made of them."""
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.records import Example, format_prompt, load_records, split, tokenize

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
GOOD = b'{"instruction": "a", "response": "b"}'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SAMPLE / "tiny")


def error(dataset):
    with pytest.raises(ValueError) as caught:
        load_records(str(dataset))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("line, problem", [
    (b'{"instruction": ', "invalid JSON"), (b"[" * 200000, "invalid JSON"), (b"\xff", "invalid UTF-8 at byte 0"),
    (b"[1]", "an object with"), (b'{"response": "b"}', "the field 'instruction' is missing"),
    (b'{"instruction": "a"}', "the field 'response' is missing"),
    (b'{"instruction": "a", "response": 3}', "the field 'response' is int"),
    (b'{"instruction": " ", "response": "b"}', "the field 'instruction' is empty"),
    (b'{"instruction": "a", "response": ""}', "the field 'response' is empty"),
    (b'{"instruction": "a", "context": 1, "response": "b"}', "the field 'context' is int"),
    (b'{"instruction": "a\\ud800", "response": "b"}', "the field 'instruction' has a lone surrogate"),
], ids=range(11))
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "records.jsonl"
    path.write_bytes(GOOD + b"\r\n\n" + line + b"\n" + GOOD)
    assert error(path).startswith(f"{path}:3: {problem}")


def test_context_is_optional_and_lines_end_where_json_says(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [{"instruction": "a\u2028\u0085b", "response": "c"},
             {"instruction": "a", "context": None, "response": "c"},
             {"instruction": "a", "context": "", "response": "c"},
             {"instruction": "a", "context": "d", "response": "c"}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert [record["context"] for record in load_records(str(path))] == ["", "", "", "d"]
    assert load_records(str(path))[0]["instruction"] == "a\u2028\u0085b"


def test_what_is_no_file_of_records(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "the data set is empty" in error(tmp_path / "empty.jsonl")
    assert f"{tmp_path}: a directory" in error(tmp_path)
    with mock.patch("datasets.load_dataset", side_effect=AssertionError("the hub was asked")):
        for name in (tmp_path / "none.jsonl", "none.jsonl", "NONE.JSONL", "./none", "~/none", "a/b/c", "two words"):
            assert f"{name}: no such file; a JSONL file or a hub id was expected" in error(name)


@pytest.mark.parametrize("failure, reason", [("off\nline", "off line"), ("", "ConnectionError")])
def test_a_hub_that_fails(failure, reason):
    for name in ("owner/name", "name", "x" * 300):
        with mock.patch("datasets.load_dataset", side_effect=ConnectionError(failure)):
            assert error(name).endswith(f"{name}: neither a file nor a reachable hub data set has that name: {reason}")


def test_rows_of_the_hub_are_checked():
    rows = [{"instruction": "a", "context": "", "response": "b", "category": "c"}]
    with mock.patch("datasets.load_dataset", return_value=rows) as load:
        assert load_records("owner/name") == [{"instruction": "a", "context": "", "response": "b"}]
        load.assert_called_once_with("owner/name", split="train")
        rows.append({"instruction": "a", "response": None})
        assert error("owner/name").startswith("owner/name row 1: the field 'response' is missing")


def test_the_prompt_ends_where_the_labels_begin(tokenizer):
    records = load_records(str(SAMPLE / "instructions.jsonl"))
    examples, truncated, dropped = tokenize(records, tokenizer, 256)
    assert (len(examples), truncated, dropped) == (len(records), 0, 0)
    for record, (ids, labels) in zip(records, examples, strict=True):
        prompt = tokenizer(format_prompt(record["instruction"], record["context"]))["input_ids"]
        answer = [*tokenizer(record["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert ids.dtype == labels.dtype == np.int32 and ids[0] == tokenizer.bos_token_id
        assert ids.tolist() == prompt + answer and labels.tolist() == [-100] * len(prompt) + answer
    with_context = format_prompt("Why?", "So.")
    assert with_context == "### Instruction\nWhy?\n\n### Context\nSo.\n\n### Answer\n"
    assert format_prompt("Why?") == "### Instruction\nWhy?\n\n### Answer\n"


class Words:
    """A tokenizer of one token per character, that ends what it is given with EOS as some do."""

    eos_token_id = 1

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        return {"input_ids": [[ord(c) for c in text] + [1] * add_special_tokens for text in texts]}


def test_no_eos_between_prompt_and_answer():
    (example,), *_ = tokenize([{"instruction": "a", "response": "b"}], Words(), 100)
    assert example.input_ids.tolist().count(1) == 1 and example.labels.tolist()[-2:] == [ord("b"), 1]


def test_truncated_and_dropped_are_counted():
    prompt = len(format_prompt("a"))
    records = [{"instruction": "a", "response": "b" * count} for count in (1, 50)]
    records.append({"instruction": "a" * 9, "response": "b"})
    examples, truncated, dropped = tokenize(records, Words(), prompt + 2)
    assert (len(examples), truncated, dropped) == (2, 2, 1)
    assert examples[1].labels.tolist() == [-100] * prompt + [ord("b")] * 2
    assert len(tokenize(records[:1], Words(), prompt + 1)[0]) == 1
    with pytest.raises(ValueError, match="no example has a target token"):
        tokenize(records, Words(), prompt)
    silent = Words()
    silent.eos_token_id = None
    with pytest.raises(ValueError, match="no EOS"):
        tokenize(records, silent, 100)


def test_the_sample(tokenizer):
    assert len(tokenizer) == 512 and type(tokenizer).__name__ == "PreTrainedTokenizerFast"
    config = json.loads((SAMPLE / "tiny" / "config.json").read_text())
    assert config["vocab_size"] == 512 and config["model_type"] == "llama"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == getattr(tokenizer, name)
    text = "".join(map(chr, range(1, 0x3000))) + " 🤗\n\t  two  spaces "
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    records = load_records(str(SAMPLE / "instructions.jsonl"))
    assert len({(record["instruction"], record["context"]) for record in records}) == len(records) > 100


def test_a_split_is_deterministic_and_shares_nothing():
    examples = [Example(np.array([i], np.int32), np.array([i], np.int32)) for i in range(40)]
    ids = [[int(example.input_ids[0]) for example in part] for part in split(examples, 10, 3)]
    assert ids == [[int(example.input_ids[0]) for example in part] for part in split(examples, 10, 3)]
    assert [len(part) for part in ids] == [36, 4] and sorted(ids[0] + ids[1]) == list(range(40))
    for percentage in (1, 99):
        assert [len(part) for part in split(examples[:2], percentage, 0)] == [1, 1]
    for count, percentage in ((1, 10), (40, 0), (40, 100)):
        with pytest.raises(ValueError, match="at least two|1 to 99"):
            split(examples[:count], percentage, 3)
