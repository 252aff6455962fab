"""What a run says at its start about fields that it does not read, and about the chat template."""

import json

from transformers import AutoTokenizer

from model.config import ModelConfig
from trainer.config import parse
from trainer.config_derived import SAMPLE
from trainer.dataset import build_rows


def summary_of(tmp_path, records, template=None):
    """The lines of the summary on the data set a.jsonl."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = template
    flags = [
        "--dataset",
        str(tmp_path / "a.jsonl"),
        "--data_cache_dir",
        str(tmp_path),
        "--max_seq_length",
        "64",
    ]
    _, _, summary = build_rows(parse(flags), tokenizer, ModelConfig.from_pretrained(SAMPLE / "tiny"))
    return [line for line in summary.splitlines() if "a.jsonl: " in line]


def test_unread_fields_are_named(tmp_path):
    record = {"instruction": "a", "response": "b"}
    records = [record, record | {"source": "own", "score": 1}, record | {"note": "x", "source": " "}]
    data, unread = summary_of(tmp_path, records)
    assert "3 examples, format dolly" in data
    assert unread == f"data: {tmp_path}/a.jsonl: fields that are not read: source, note"
    (data,) = summary_of(tmp_path, [record])


def test_warnings_are_counted(tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ending = (
        "{% for m in messages %}{{ m.role + m.content + {'b': ''}.get(m.content, eos_token) }}{% endfor %}"
    )
    other = {"messages": [record["messages"][0], {"role": "assistant", "content": "c"}]}
    data, warning = summary_of(tmp_path, [other, record, other, record], ending)
    assert warning.startswith(f"warning: {tmp_path}/a.jsonl: the chat template writes no end token")
    assert warning.endswith(f"(2 of 4 examples, the first: {tmp_path}/a.jsonl:2)")
