"""Formats: prompts and answers, and the trained parts of chats compared with those of transformers."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from data.formats import format_prompt, guess_format, load_function, render
from data.sources import BadRecord
from trainer.config_derived import SAMPLE

# Llama 3's template, with the marks from which transformers knows the assistant's messages.
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Sure?\n"},
    {"role": "assistant", "content": " Yes, 🤗 ä.\n"},
]


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = PLAIN
    return tokenizer


def test_prompts_and_answers(tokenizer):
    for name, record, prompt, text in [
        ("dolly", {"instruction": "a", "response": "b", "category": 3}, format_prompt("a"), "b"),
        ("dolly", {"instruction": "a", "context": None, "response": "b"}, format_prompt("a"), "b"),
        ("dolly", {"instruction": "a", "context": "c", "response": "b"}, format_prompt("a", "c"), "b"),
        ("alpaca", {"instruction": "a", "input": "c", "output": "b"}, format_prompt("a", "c"), "b"),
        ("prompt_completion", {"prompt": "a ", "completion": "b"}, "a ", "b"),
        ("text", {"text": "a\nb"}, "", "a\nb"),
    ]:
        assert guess_format(record, "here") == name
        rendered = render(record, "here", name, tokenizer)
        assert (rendered.prompt, rendered.text, rendered.spans) == (prompt, text, None)
        assert rendered.question == (prompt or text)
    assert format_prompt("Why?", "So.") == "### Instruction\nWhy?\n\n### Context\nSo.\n\n### Answer\n"
    assert format_prompt("Why?") == "### Instruction\nWhy?\n\n### Answer\n"


@pytest.mark.parametrize(
    "messages", [CHAT, CHAT[1:3], CHAT[:4], [CHAT[2], *CHAT[1:]], [{"role": "assistant", "content": "s"}]]
)
def test_chat_masks_are_those_of_transformers(tokenizer, tmp_path, messages):
    from data.tokens import tokenize

    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    tokens = tokenize(str(path), tokenizer, cache=tmp_path)
    tokenizer.chat_template = MARKED
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.meta["format"] == "messages" and tokens.meta["guessed"]
    assert tokens.input_ids.tolist() == expected["input_ids"]
    assert tokens.trained.tolist() == [bool(value) for value in expected["assistant_masks"]] and any(
        tokens.trained
    )


@pytest.mark.parametrize(
    "record, question",
    [
        (
            {"instruction": "Why?", "context": "So.", "response": "Well."},
            "### Instruction\nWhy?\n\n### Context\nSo.\n\n### Answer\n",
        ),
        (
            {"instruction": "Add.", "input": "1, 1", "output": "2 🤗"},
            "### Instruction\nAdd.\n\n### Context\n1, 1\n\n### Answer\n",
        ),
        ({"prompt": "Once upon\n", "completion": "a time"}, "Once upon\n"),
        ({"text": "To be,\nor not"}, ""),
    ],
)
def test_masks_of_the_other_formats_are_those_of_transformers(tokenizer, tmp_path, record, question):
    """The reference is the same text from a chat template that marks the answer."""
    from data.tokens import tokenize

    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    tokens = tokenize(str(tmp_path / "a.jsonl"), tokenizer, cache=tmp_path)
    answer = next(
        value for name, value in record.items() if name in ("response", "output", "completion", "text")
    )
    tokenizer.chat_template = (
        "{{ bos_token + messages[0]['content'] }}{% generation %}{{ messages[1]['content'] + eos_token }}"
        "{% endgeneration %}"
    )
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.input_ids.tolist() == expected["input_ids"]
    assert tokens.trained.tolist() == [bool(value) for value in expected["assistant_masks"]]


def test_of_prompt_and_completion_in_messages_the_completion_trains(tokenizer):
    rendered = render({"prompt": CHAT[:4], "completion": CHAT[4:]}, "here", "prompt_completion", tokenizer)
    ((start, stop),) = rendered.spans
    assert rendered.text[start:stop] == " Yes, 🤗 ä.\n</s>" and rendered.text[:start].endswith(
        "<|assistant|>\n"
    )
    assert rendered.question.endswith(
        "What is 1 + 1?</s><|assistant|>\n"
    )  # with an answer of other turns on one side


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_format.py").write_text(
        "def convert(it):\n    return {'prompt': it['q'], 'completion': it['a']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function, code = load_function("my_format:convert")
    assert function({"q": "1", "a": "2"}) == {"prompt": "1", "completion": "2"} and "def convert" in code
    for name in ("my_format:other", "no_such_module:convert", "math:pi"):
        with pytest.raises(ValueError, match=f"--format {name}: .* has no function"):
            load_function(name)
    del sys.modules["my_format"]


BAD = [
    ("dolly", [1], "an object with instruction, response was expected; this is list"),
    ("dolly", {"response": "b"}, "the field 'instruction' is missing"),
    ("dolly", {"instruction": "a", "response": 3}, "the field 'response' is int"),
    ("dolly", {"instruction": " ", "response": "b"}, "the field 'instruction' is empty"),
    ("dolly", {"instruction": "a", "response": ""}, "the field 'response' is empty"),
    ("dolly", {"instruction": "a", "context": 1, "response": "b"}, "the field 'context' is int"),
    ("dolly", {"instruction": "a\ud800", "response": "b"}, "the field 'instruction' has a lone surrogate"),
    ("alpaca", {"instruction": "a", "output": None}, "the field 'output' is missing"),
    ("prompt_completion", {"prompt": [CHAT[1]], "completion": "x"}, "so must be 'completion'"),
    ("text", {"text": "\n"}, "the field 'text' is empty"),
    ("messages", {"messages": []}, "the field 'messages' is no list of messages"),
    ("messages", {"messages": "hello"}, "the field 'messages' is no list of messages"),
    ("messages", {"messages": ["hello"]}, ", message 0: an object with role and content was expected"),
    (
        "messages",
        {"messages": [{"role": "robot", "content": "x"}]},
        ", message 0: the role is 'robot'; system, user,",
    ),
    (
        "messages",
        {"messages": [CHAT[1], {"role": "assistant", "content": ""}]},
        ", message 1: the field 'content' is empty",
    ),
    (
        "messages",
        {"messages": [CHAT[1], {"role": "assistant"}]},
        ", message 1: the field 'content' is missing",
    ),
    ("messages", {"messages": CHAT[:2]}, "no message of the assistant"),
]


@pytest.mark.parametrize("name, record, problem", BAD)
def test_a_bad_record_is_named(tokenizer, name, record, problem):
    with pytest.raises(BadRecord) as caught:
        render(record, "file:3", name, tokenizer)
    assert (
        str(caught.value).startswith("file:3")
        and problem in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_templates_that_fail(tokenizer):
    record = {"messages": CHAT[1:3]}
    for template, problem in [
        ("{{ raise_exception('no system') }}", "file:3: the chat template fails: no system"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "writes the turns before an answer"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(BadRecord, match=problem):
            render(record, "file:3", "messages", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        render(record, "file:3", "messages", tokenizer)


COLUMNS = [
    ("dolly", {"instruction": "a", "input": "c", "response": "b"}, format_prompt("a", "c")),
    ("alpaca", {"instruction": "a", "context": "c", "output": "b"}, format_prompt("a", "c")),
    ("dolly", {"instruction": "a", "input": "c", "context": "", "response": "b"}, format_prompt("a", "c")),
    ("dolly", {"instruction": "a", "input": "", "context": None, "response": "b"}, format_prompt("a")),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "system": "", "history": [[None, ""]]},
        format_prompt("a"),
    ),
    ("prompt_completion", {"prompt": "So is it. Why?", "completion": "b", "context": "So is  it."}, None),
    ("text", {"text": "Be brief. Q A", "system": "Be brief.", "tools": []}, ""),
]


@pytest.mark.parametrize("name, record, prompt", COLUMNS)
def test_fields_that_decide_the_answer_are_read(tokenizer, name, record, prompt):
    assert guess_format(record, "here") == name
    example = render(record, "here", name, tokenizer)
    assert example.prompt == (record["prompt"] if prompt is None else prompt)


@pytest.mark.parametrize(
    "name, record, field",
    [
        ("alpaca", {"instruction": "a", "output": "b", "system": "Be brief."}, "system"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q", "a?"]]}, "history"),
        ("dolly", {"instruction": "a", "input": "c", "context": "d", "response": "b"}, "input"),
        ("dolly", {"instruction": "a", "response": "b", "system_prompt": "Be brief."}, "system_prompt"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "tools": [{"name": "add"}]}, "tools"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "input": 3}, "input"),
        ("text", {"text": "a", "context": "So."}, "context"),
        ("messages", {"messages": CHAT, "history": [["q", "a"]]}, "history"),
        ("messages", {"messages": CHAT, "input": "table"}, "input"),
    ],
)
def test_fields_that_decide_the_answer_and_are_not_read_are_refused(tokenizer, name, record, field):
    with pytest.raises(
        BadRecord, match=f"file:3: the field '{field}' decides the answer, and --format {name} "
    ):
        render(record, "file:3", name, tokenizer)


def test_what_only_the_answer_quotes_is_not_read(tokenizer):
    record = {"prompt": "Cite.", "completion": "It says: Rome burned.", "context": "Rome burned."}
    with pytest.raises(BadRecord, match="the field 'context' decides the answer"):
        render(record, "file:1", "prompt_completion", tokenizer)
    assert render(record | {"prompt": "Cite: Rome burned."}, "file:1", "prompt_completion", tokenizer)


def test_the_system_field_of_messages_is_their_first(tokenizer):
    expected = render({"messages": CHAT}, "here", "messages", tokenizer)
    for field in ("system", "system_prompt"):
        record = {"messages": CHAT[1:], field: "Be brief."}
        assert render(record, "here", "messages", tokenizer) == expected
        halves = {"prompt": CHAT[1:4], "completion": CHAT[4:], field: "Be brief."}
        example = render(halves, "here", "prompt_completion", tokenizer)
        assert (example.text, example.spans) == (expected.text, expected.spans[1:])
    with pytest.raises(BadRecord, match="message 0: the role is 'x'"):
        render({"messages": [{"role": "x"}], "system": "Be brief."}, "here", "messages", tokenizer)


def test_fields_that_are_not_read_are_named(tokenizer):
    record = {"instruction": "a", "response": "b", "source": "own", "id": 3, "scores": [0.5], "tags": ["x"]}
    assert render(record | {"empty": " "}, "here", "dolly", tokenizer).unread == ("source", "tags")
    assert render({"messages": CHAT, "prompt": "x"}, "here", "messages", tokenizer).unread == ("prompt",)


def test_fields_of_no_format():
    for record, problem in [
        ({"question": "a"}, "the fields 'question' are of no known format"),
        ({}, r"the fields \(none\)"),
        ("a", "an object was expected; this is str"),
    ]:
        with pytest.raises(BadRecord, match=problem):
            guess_format(record, "file:1")
