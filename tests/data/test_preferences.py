"""Preference pairs: the spellings of data sets, what is refused, and how pairs become rows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data.loader import Loader
from data.preferences import render_pair
from data.selection import fit_pairs, split, weigh
from data.sources import BadRecord
from data.tokens import tokenize
from tests.support.examples import tokens_of
from trainer.config import Config
from trainer.config_derived import SAMPLE
from trainer.dataset import build_rows
from trainer.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = [{"role": "user", "content": "Why?"}]


def message(text, role="assistant"):
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(SAMPLE / "tiny")
    found.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "Q: ", "chosen": "yes", "rejected": "no"}, [("Q: ", "yes"), ("Q: ", "no")]),
        (
            {"question": "Q: ", "chosen": "yes", "rejected": "no", "margin": 2},
            [("Q: ", "yes"), ("Q: ", "no")],
        ),
        (
            {"query": "Q: ", "response_chosen": "yes", "response_rejected": "no"},
            [("Q: ", "yes"), ("Q: ", "no")],
        ),
        # Anthropic's: two whole texts, which part within a word
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: I do", "rejected": "\n\nHuman: Q\n\nAssistant: It is"},
            [("\n\nHuman: Q\n\nAssistant:", " I do"), ("\n\nHuman: Q\n\nAssistant:", " It is")],
        ),
        (
            {"instruction": "Q", "chosen_response": "yes", "rejected_response": "no"},
            [("### Instruction\nQ\n\n### Answer\n", "yes"), ("### Instruction\nQ\n\n### Answer\n", "no")],
        ),
    ],
)
def test_spellings_of_texts(tokenizer, record, expected):
    assert [(each.prompt, each.text) for each in render_pair(record, "here", tokenizer)] == expected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": QUESTION, "chosen": [message("yes")], "rejected": [message("no")]},
        {"prompt": "Why?", "chosen": [message("yes")], "rejected": [message("no")]},
        {"chosen": [*QUESTION, message("yes")], "rejected": [*QUESTION, message("no")]},
        {"prompt": "Why?", "chosen": [*QUESTION, message("yes")], "rejected": [*QUESTION, message("no")]},
        {"prompt": QUESTION, "chosen": [*QUESTION, message("yes")], "rejected": [*QUESTION, message("no")]},
    ],
)
def test_spellings_of_chats(tokenizer, record):
    chosen, rejected = render_pair(record, "here", tokenizer)
    assert (chosen.text, rejected.text) == (
        "<|user|>Why?</s><|assistant|>yes</s>",
        "<|user|>Why?</s><|assistant|>no</s>",
    )
    assert [chosen.text[slice(*span)] for span in chosen.spans] == ["yes</s>"]
    assert chosen.question == rejected.question


def test_a_system_field_makes_a_chat(tokenizer):
    record = {"system": "Be brief.", "question": "Why?", "chosen": "yes", "rejected": "no"}
    assert render_pair(record, "here", tokenizer)[0].text == (
        "<|system|>Be brief.</s><|user|>Why?</s><|assistant|>yes</s>"
    )


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"prompt": "Q", "chosen": "yes"}, "are no preference pair"),
        (["Q"], "fields list are no preference pair"),
        ({"prompt": "Q", "chosen": "yes", "rejected": "yes"}, "are equal; two answers were expected"),
        ({"prompt": "Q", "chosen": "yes", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "Q", "chosen": "yes", "rejected": [message("no")]}, "two texts, or two lists"),
        ({"chosen": "yes", "rejected": "no"}, "there is no prompt"),
        ({"chosen": "Q A", "rejected": "Q "}, "there is no prompt"),
        ({"chosen": QUESTION, "rejected": [*QUESTION, message("no")]}, "1 of 1 and 2 messages in common"),
        (
            {"prompt": "When?", "chosen": [*QUESTION, message("a")], "rejected": [*QUESTION, message("b")]},
            "begin",
        ),
        ({"prompt": "Q", "context": "C", "chosen": "yes", "rejected": "no"}, "'context' decides the answer"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_position(tokenizer, record, problem):
    with pytest.raises(BadRecord, match=problem) as found:
        render_pair(record, "file.jsonl, line 7", tokenizer)
    assert str(found.value).startswith("file.jsonl, line 7")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_bad_pairs_are_counted(tmp_path, tokenizer):
    good = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}
    bad = good | {"rejected": "yes"}
    name = write(tmp_path / "pairs.jsonl", [good, bad, good | {"prompt": "R: "}])
    with pytest.raises(ValueError, match=r"jsonl:2: 'chosen' and 'rejected' are equal.*--skip_bad"):
        tokenize(name, tokenizer, pairs=True, cache=tmp_path)
    found = tokenize(name, tokenizer, pairs=True, skip_bad=True, cache=tmp_path)
    assert len(found) == 4 and found.meta["skipped"] == 1 and found.meta["pairs"]
    assert found.groups[0] == found.groups[1] != found.groups[2]
    assert "jsonl:3, rejected" in found.where(3)


def test_pairs_stay_together():
    tokens = tokens_of([(range(n), [False] + [True] * (n - 1)) for n in (3, 4, 5, 6, 2, 2)])
    tokens = replace(tokens, groups=np.repeat(np.arange(3, dtype=np.uint64), 2))
    train, held_out = split([tokens], 40, 0)
    assert sorted([*train[0], *held_out[0]]) == list(range(6)) and len(held_out[0]) == 2
    assert all(first % 2 == 0 and second == first + 1 for first, second in held_out[0].reshape(-1, 2))
    (twice,) = weigh([np.arange(6)], [1.5], 0, pairs=True)
    assert len(twice) in (8, 10) and (twice.reshape(-1, 2) @ [-1, 1] == 1).all()
    pieces, left_out = fit_pairs([tokens], [np.arange(6)], 8, refuse=False)
    assert pieces.lengths.tolist() == [3, 4, 2, 2] and left_out == [(0, 2)]


def test_a_pair_that_does_not_fit(tmp_path):
    long = {"prompt": "Q: ", "chosen": "yes " * 40, "rejected": "no"}
    short = {"prompt": "R: ", "chosen": "yes", "rejected": "no"}
    name = write(tmp_path / "pairs.jsonl", [short, long, short | {"chosen": "yes!"}])
    tokenizer, flags = load_tokenizer(SAMPLE / "tiny"), {"objective": "dpo", "dataset": [name]}
    flags |= {"max_seq_length": 64, "data_cache_dir": str(tmp_path / "cache")}

    class Model:
        vocab_size, max_positions, positions_field = 10**6, 4096, ""

    rows, _, summary = build_rows(Config(**flags), tokenizer, Model)
    assert "train on 2 preference pairs in 1 rows" in summary and "at most 2 a row" in summary
    assert "1 of 3 pairs to train on are left out" in summary and "jsonl:2, chosen" in summary
    with pytest.raises(ValueError, match=r"jsonl:2, chosen: the pair's \d+ tokens are more than --max"):
        build_rows(Config(**flags, long_examples="refuse"), tokenizer, Model)
    with pytest.raises(ValueError, match="no pair fits"):
        build_rows(Config(**flags | {"max_seq_length": 4}), tokenizer, Model)
    # Chosen and rejected alternate, and a row of padding has values too.
    rows = replace(rows, values=np.array([1, 2, 3, 4], np.float32))
    loader = Loader(rows, batch_size=2, accumulation=1, dp_rank=0, dp_size=1, seed=0)
    (batch,) = loader.step(0)
    assert batch["segment_ids"][0].max() == 4 and batch["segment_values"].tolist()[1] == [0, 0, 0, 0]
    assert sorted(batch["segment_values"].tolist()[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"dpo_beta": 0.2}, "--dpo_beta is of --objective dpo"),
        ({"objective": "dpo", "dpo_label_smoothing": 0.5}, "from 0 to below 0.5"),
        ({"objective": "dpo", "dpo_label_smoothing": 0.1, "dpo_loss": "ipo"}, "is of --dpo_loss sigmoid"),
        ({"objective": "dpo", "train_on_prompt": True}, "--train_on_prompt has no meaning"),
        ({"objective": "dpo", "long_examples": "truncate"}, "pairs are never cut"),
        ({"objective": "dpo", "dpo_beta": 0.0}, "--dpo_beta 0.0: a number above 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, problem):
    with pytest.raises(ValueError, match=problem):
        Config(**flags)
