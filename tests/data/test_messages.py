"""Messages: the spellings that data sets have, and the keys that Arrow adds."""

import json

import pytest
from transformers import AutoTokenizer

from data.formats import guess_format
from data.messages import is_quoted, is_written, read_chat, squeeze, without_nulls
from data.sources import BadRecord
from data.tokens import tokenize
from trainer.config_derived import SAMPLE

QUESTION, ANSWER = {"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "A."}
PARTS = [{"type": "text", "text": "Q"}, {"type": "text", "text": "1?"}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]
MIXED = [
    {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
            {"role": "tool", "content": "5", "name": "add"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}],
    },
    {"messages": [QUESTION, ANSWER]},
    {
        "messages": [QUESTION, {"role": "assistant", "tool_calls": CALLS}],
        "tools": [{"type": "function", "function": {"name": "sub", "parameters": {"b": {"type": "int"}}}}],
    },
]
# Fails on a key without a value, as Llama 3.1's template does.
TOOLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if 'name' in message %}{{ message['name'] + ': ' }}{% endif %}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% if 'tool_calls' in message %}{% for number in range(message['tool_calls'] | length) %}"
    "{{ message['tool_calls'][number] | tojson }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read(messages, system="", tools=None):
    return read_chat(messages, tools, system, "file:3").messages


def test_spellings():
    for messages in [
        [QUESTION, ANSWER],
        [{"from": "human", "value": "Q1?"}, {"from": "gpt", "value": "A."}],
        [{"from": "user", "value": "Q1?", "role": None}, {"from": "assistant", "value": "A.", "weight": 1}],
        [
            {"role": "user", "content": PARTS},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
        ],
        [{"role": "user", "content": [part | {"image_url": None} for part in PARTS]}, ANSWER],
        [QUESTION, ANSWER | {"tool_calls": []}],
    ]:
        assert read(messages) == [QUESTION, ANSWER]
    tool = [{"from": "observation", "value": "5"}, {"role": "ipython", "content": ""}]
    assert [message["role"] for message in read([*tool, ANSWER])] == ["tool", "ipython", "assistant"]
    for name in ("messages", "conversations", "conversation"):
        assert guess_format({name: [QUESTION, ANSWER]}, "here") == "messages"


@pytest.mark.parametrize(
    "message, problem",
    [
        ({"from": "function_call", "value": "{}"}, "the role is 'function_call'; system, user,"),
        ({"from": "human"}, "the field 'content' is missing"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of the content is 'image_url'"),
        ({"role": "user", "content": ["Q1?"]}, "a part of the content is 'str'"),
        ({"role": "user", "content": []}, "the field 'content' is empty"),
        ({"role": "user", "content": None, "tool_calls": CALLS}, "the field 'content' is missing"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "the field 'content' is empty"),
    ],
)
def test_what_is_no_message(message, problem):
    with pytest.raises(BadRecord, match=f"^file:3, message 0: {problem}"):
        read([message, ANSWER])


def test_a_system_field_is_the_system_message():
    system = {"role": "system", "content": "Be brief."}
    for messages in [
        [QUESTION, ANSWER],
        [system, QUESTION, ANSWER],
        [system | {"content": ""}, QUESTION, ANSWER],
        [system | {"content": None}, QUESTION, ANSWER],
    ]:
        assert read(messages, "Be brief.") == [system, QUESTION, ANSWER]
    assert read([QUESTION, ANSWER], " ") == [QUESTION, ANSWER]
    assert read([system | {"content": ""}, QUESTION]) == [system | {"content": ""}, QUESTION]
    with pytest.raises(BadRecord, match="file:3: the record has a system field, and its messages begin with"):
        read([system, QUESTION], "Be long.")
    chat = read_chat([QUESTION, ANSWER | {"weight": 0}, ANSWER], None, "Be brief.", "here")
    assert chat.untrained == {2} and chat.added == 1


def save(kind, path):
    """The records as a file or directory of that kind."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MIXED), path / "a.parquet")
        return path / "a.parquet"
    Dataset.from_list(MIXED).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_the_keys_that_arrow_adds_are_left_out(tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = TOOLS
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MIXED))
    expected = tokenize(str(tmp_path / "a.jsonl"), tokenizer, cache=tmp_path)
    tokens = tokenize(str(save(kind, tmp_path)), tokenizer, cache=tmp_path)
    assert tokens.input_ids.tolist() == expected.input_ids.tolist()
    assert tokens.trained.tolist() == expected.trained.tolist()
    for number, record in enumerate(MIXED):
        reference = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), tokenize=False
        )
        ids = expected.input_ids[slice(*expected.offsets[number : number + 2])]
        assert tokenizer.decode(ids) == reference and "null" not in reference


def test_keys_without_a_value_are_left_out_at_any_depth():
    value = {"a": None, "b": [{"c": None, "d": [None, 1, {"e": None}]}, None], "f": "", "g": 0}
    assert without_nulls(value) == {"b": [{"d": [None, 1, {}]}, None], "f": "", "g": 0}


def test_what_is_written():
    text = squeeze('Say  "hi"\n and {"a": "x \\"y\\"\\n"} {\\"b\\": 12} \\u00e4')
    for value in ["hi", 'x "y"\n', {"b": 12}, ["Say\n", {"a": None}], "ä", None, [], True, "say".title()]:
        assert is_written(value, text)
    for value in ["bye", {"c": 1}, 13, ["hi", "x z"]]:
        assert not is_written(value, text)


def test_what_is_quoted():
    text = "### Context\nThe table  has 12 rows. {x}"
    for value in ["The table has\n12 rows.", "12", ["table", {"rows": None}], "{x}", "", None]:
        assert is_quoted(value, text)
    for value in ["c", "1", "table 12", ["table", "columns"]]:
        assert not is_quoted(value, text)
