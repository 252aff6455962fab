"""Tokenizing: ids and masks, the cache, and skipped records."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.formats import format_prompt
from data.token_cache import cache_directory
from data.tokens import tokenize
from trainer.config_derived import SAMPLE


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(SAMPLE / "tiny")


def write(path, *records):
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    )
    return str(path)


def test_the_prompt_ends_where_the_labels_begin(tokenizer, tmp_path):
    records = [json.loads(line) for line in (SAMPLE / "instructions.jsonl").read_text().splitlines()]
    tokens = tokenize(str(SAMPLE / "instructions.jsonl"), tokenizer, cache=tmp_path)
    assert len(tokens) == len(records)
    assert {**tokens.meta, "files": None, "unread": list(tokens.meta["unread"])} == {
        "format": "dolly",
        "guessed": True,
        "plain_text": False,
        "skipped": 0,
        "named": [],
        "files": None,
        "prompts": "instruction",
        "unread": ["category"],
    }
    for number, record in enumerate(records):
        prompt = tokenizer(format_prompt(record["instruction"], record["context"]))["input_ids"]
        answer = [
            *tokenizer(record["response"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        where = slice(*tokens.offsets[number : number + 2])
        assert tokens.input_ids[where].tolist() == prompt + answer and prompt[0] == tokenizer.bos_token_id
        assert tokens.trained[where].tolist() == [False] * len(prompt) + [True] * len(answer)
        assert tokens.where(number).endswith(f"instructions.jsonl:{number + 1}")
    everything = tokenize(str(SAMPLE / "instructions.jsonl"), tokenizer, train_on_prompt=True, cache=tmp_path)
    assert everything.trained.all() and np.array_equal(everything.input_ids, tokens.input_ids)


def test_plain_text_trains_whole(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be")
    tokens = tokenize(str(tmp_path / "a.txt"), tokenizer, cache=tmp_path)
    assert tokenizer.decode(tokens.input_ids) == "<s>To be, or not to be</s>"
    assert tokens.trained.tolist() == [False] + [True] * (
        len(tokens.input_ids) - 1
    )  # nothing predicts the first


class Words:
    """A tokenizer of one token per character, that ends what it is given with EOS as some do."""

    eos_token, eos_token_id, bos_token, is_fast, chat_template = "\1", 1, None, False, None

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        return {"input_ids": [[ord(c) for c in text] + [1] * add_special_tokens for text in texts]}

    def get_vocab(self):
        return {}


def test_no_eos_between_prompt_and_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    tokens = tokenize(path, Words(), cache=tmp_path)
    assert tokens.input_ids.tolist() == [ord("a"), ord("b"), 1] and tokens.trained.tolist() == [
        False,
        True,
        True,
    ]
    silent = Words()
    silent.eos_token_id = None
    with pytest.raises(ValueError, match="no EOS"):
        tokenize(path, silent, cache=tmp_path)


def entries(cache):
    return {path for path in cache.iterdir() if path.is_dir()}


def test_the_second_start_reads_and_what_changed_is_made_anew(tokenizer, tmp_path, monkeypatch):
    """A cached data set of 15,000 records is read in less than two seconds."""
    cache, data = tmp_path / "cache", tmp_path / "data.jsonl"
    cache.mkdir()
    words = "the quick brown fox jumps over the lazy dog " * 12
    records = [{"instruction": f"Say {number}", "response": words} for number in range(15000)]
    write(data, *records)
    first = tokenize(str(data), tokenizer, cache=cache)
    (entry,) = entries(cache)
    begun = time.perf_counter()
    again = tokenize(str(data), tokenizer, cache=cache)
    assert time.perf_counter() - begun < 2 and entries(cache) == {entry}
    assert np.array_equal(first.input_ids, again.input_ids) and again.where(14999).endswith(
        "data.jsonl:15000"
    )

    (tmp_path / "my_cached_format.py").write_text("def convert(record):\n    return record\n")
    monkeypatch.syspath_prepend(tmp_path)
    small = Path(write(tmp_path / "small.jsonl", *records[:20]))
    other = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    other.add_tokens(["fox"])
    template = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    template.chat_template = "{{ messages }}"
    known = entries(cache)
    for chosen, flags in [
        (tokenizer, {}),
        (other, {}),
        (template, {}),
        (tokenizer, {"train_on_prompt": True}),
        (tokenizer, {"max_samples": 5}),
        (tokenizer, {"format_name": "dolly"}),
        (tokenizer, {"skip_bad": True}),
        (tokenizer, {"format_name": "my_cached_format:convert"}),
    ]:
        made = tokenize(str(small), chosen, cache=cache, **flags)
        assert len(made) == flags.get("max_samples", 20)
        assert len(entries(cache)) == len(known) + 1, flags
        known = entries(cache)
    small.write_text(small.read_text().replace("Say 3", "Say three"))
    tokenize(str(small), tokenizer, cache=cache)
    assert len(entries(cache)) == len(known) + 1


def test_an_entry_that_was_not_finished_is_none(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": ""})
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(
        ValueError, match=r"a.jsonl:2: the field 'text' is empty; .* \(--skip_bad leaves such records out\)"
    ):
        tokenize(path, tokenizer, cache=cache)
    assert not list(cache.iterdir())


def test_a_damaged_entry_is_made_anew(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    cache = tmp_path / "cache"
    cache.mkdir()
    expected = tokenize(path, tokenizer, cache=cache).input_ids.tolist()
    (entry,) = entries(cache)
    for damage in (
        lambda: (entry / "input_ids.bin").write_bytes(b"12"),
        lambda: (entry / "where.txt").unlink(),
        lambda: (entry / "meta.json").write_text("{}"),
        lambda: (entry / "meta.json").unlink(),
        lambda: (entry.rename(tmp_path / "away"), entry.touch()),
    ):
        damage()
        assert tokenize(path, tokenizer, cache=cache).input_ids.tolist() == expected and entries(cache) == {
            entry
        }


def test_white_space_that_a_tokenizer_trims_from_its_places_trains(tmp_path):
    """Byte-level tokenizers with trim_offsets give a token of spaces an empty range."""
    files = tmp_path / "trimming"
    shutil.copytree(SAMPLE / "tiny", files)
    settings = json.loads((files / "tokenizer.json").read_text())
    trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    settings["post_processor"] = {"type": "Sequence", "processors": [trim, settings["post_processor"]]}
    (files / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(files)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    answer = "def f():\n        return  1\n\n    x"
    chat = [{"role": "user", "content": "go"}, {"role": "assistant", "content": answer}]
    tokens = tokenize(write(tmp_path / "a.jsonl", {"messages": chat}), tokenizer, cache=tmp_path)
    assert tokenizer.decode(tokens.input_ids[tokens.trained]) == answer + "</s>"
    assert tokenizer.decode(tokens.input_ids[~tokens.trained]) == "<user>\ngo</s><assistant>\n"


def test_bad_records_are_counted_and_named(tokenizer, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        '{"te',
        {"text": "one"},
        {"text": 3},
        {"other": "x"},
        *[{"text": ""}] * 9,
        {"text": "two"},
    )
    tokens = tokenize(path, tokenizer, skip_bad=True, cache=tmp_path)
    assert tokenizer.batch_decode([tokens.input_ids]) == ["<s>one</s><s>two</s>"]
    assert tokens.meta["skipped"] == 12 and len(tokens.meta["named"]) == 5
    assert "a.jsonl:1: invalid JSON" in tokens.meta["named"][0]
    assert "a.jsonl:3: the field 'text' is int" in tokens.meta["named"][1]
    with pytest.raises(
        ValueError,
        match="the data set is empty; .*; 1 were skipped, the first: .*a.jsonl:1: the field 'text'",
    ):
        tokenize(
            write(tmp_path / "a.jsonl", {"text": ""}),
            tokenizer,
            format_name="text",
            skip_bad=True,
            cache=tmp_path,
        )


def test_a_format_that_is_none(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(
        ValueError, match="--format jsonl: auto, messages, .* or module:function was expected"
    ):
        tokenize(path, tokenizer, format_name="jsonl", cache=tmp_path)
    with pytest.raises(ValueError, match="a.jsonl:1: the field 'instruction' is missing"):
        tokenize(path, tokenizer, format_name="dolly", cache=tmp_path)
    with pytest.raises(ValueError, match="--format json:loads raises TypeError"):
        tokenize(path, tokenizer, format_name="json:loads", cache=tmp_path)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (
        cache_directory(None) == tmp_path / "markstep" / "tokens"
        and cache_directory(str(tmp_path / "x")) == tmp_path / "x"
    )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        cache_directory(str(tmp_path / "file" / "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_directory(None).is_dir()


def test_the_sample(tokenizer):
    assert len(tokenizer) == 512 and type(tokenizer).__name__ in (
        "PreTrainedTokenizerFast",  # transformers 4
        "TokenizersBackend",
    )
    config = json.loads((SAMPLE / "tiny" / "config.json").read_text())
    assert config["vocab_size"] == 512 and config["model_type"] == "llama"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == getattr(tokenizer, name)
    text = "".join(map(chr, range(1, 0x3000))) + " 🤗\n\t  two  spaces "
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    records = [json.loads(line) for line in (SAMPLE / "instructions.jsonl").read_text().splitlines()]
    assert len({(record["instruction"], record["context"]) for record in records}) == len(records) > 100
