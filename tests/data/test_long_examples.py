"""Which examples of a data set a run trains on, and what its summary says of the others."""

import json
from dataclasses import replace

import numpy as np
import pytest

from model.config import ModelConfig
from tests.support.examples import tokens_of
from trainer import dataset
from trainer.config import parse
from trainer.config_derived import SAMPLE
from trainer.dataset import build_rows
from trainer.tokenizer import load_tokenizer

SHORT = {"instruction": "Why?", "response": "So."}
LONG = {"instruction": "a b c d e " * 60, "response": "So."}  # its answer lies beyond 64 tokens


def rows_of(tmp_path, records, *flags):
    """(training rows, held-out rows, summary) of the records, with rows of 64 tokens."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["--dataset", path, "--data_cache_dir", tmp_path / "cache", "--max_seq_length", 64, *flags]
    tokenizer, config = load_tokenizer(SAMPLE / "tiny"), ModelConfig.from_pretrained(SAMPLE / "tiny")
    return build_rows(parse(list(map(str, given))), tokenizer, config)


@pytest.mark.parametrize("flags", [(), ("--skip_bad",), ("--packing", "false")])
def test_an_answer_beyond_the_row_is_left_out_and_named(tmp_path, flags):
    rows, _, summary = rows_of(tmp_path, [SHORT, LONG, SHORT, *[LONG] * 6], *flags)
    assert sum(map(len, rows.groups)) == 2
    assert "train on 2 examples in" in summary and "7 longer than a row" in summary
    named = "; ".join(f"{tmp_path}/a.jsonl:{line}" for line in (2, 4, 5, 6, 7))
    assert (
        f"data: 7 of 9 examples to train on are left out: no target token is within --max_seq_length 64: "
        f"{named} ..."
    ) in summary


def test_nothing_is_said_where_all_are_trained(tmp_path):
    assert "left out" not in rows_of(tmp_path, [SHORT, SHORT])[2]
    assert "left out" not in rows_of(tmp_path, [SHORT, LONG], "--long_examples", "split")[2]


def test_held_out_examples_are_left_out_in_the_same_way(tmp_path):
    records = [SHORT | {"instruction": f"{number}?"} for number in range(6)]
    records += [LONG | {"instruction": f"{number} {LONG['instruction']}"} for number in range(6)]
    train, held_out, summary = rows_of(
        tmp_path, records, "--do_eval", "--validation_split_percentage", 50, "--seed", 1
    )
    assert sum(map(len, train.groups)) + sum(map(len, held_out.groups)) == 6
    for purpose in ("train", "evaluate"):
        assert f"of 6 examples to {purpose} on are left out" in summary


def test_a_repeated_example_is_named_once(tmp_path):
    _, _, summary = rows_of(tmp_path, [SHORT, LONG], "--dataset_weights", 3)
    assert "3 of 6 examples to train on are left out" in summary and summary.count("a.jsonl:2") == 1


def test_broken_records_still_stop_the_start(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl:2: the field 'response' is empty"):
        rows_of(tmp_path, [SHORT, SHORT | {"response": ""}, LONG])


def test_an_example_that_no_row_length_would_train_stops_the_start(tmp_path, monkeypatch):
    tokens = tokens_of([(np.arange(3), np.array([False, True, True])), (np.arange(90), np.zeros(90, bool))])
    meta = tokens.meta | {"guessed": False, "skipped": 0, "prompts": "chat"}
    tokens = replace(tokens, directory=tmp_path, meta=meta)
    (tmp_path / "where.txt").write_text("file:1\nfile:2\n")
    monkeypatch.setattr(dataset, "tokens_of", lambda *_: [tokens])
    with pytest.raises(
        ValueError, match=r"file:2: the example has no target token \(1 such examples; --skip_b"
    ):
        rows_of(tmp_path, [SHORT])
    assert "1 of 2 examples to train on are left out" in rows_of(tmp_path, [SHORT], "--skip_bad")[2]


def test_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="no example has a target token within --max_seq_length 64: nothing"):
        rows_of(tmp_path, [LONG])
    with pytest.raises(ValueError, match="tokens are more than --max_seq_length 64: raise it"):
        rows_of(tmp_path, [SHORT, LONG], "--long_examples", "refuse")
