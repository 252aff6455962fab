"""Chats: calls, tools, weights, and what a template leaves out; compared with transformers' own masks."""

import json

import pytest
import transformers
from transformers import AutoTokenizer

from data.formats import render
from data.sources import BadRecord
from data.tokens import tokenize
from trainer.config_derived import SAMPLE

# Writes tools and calls as Llama 3.1's template does, and marks what the assistant says.
TOOLS = (
    "{{ bos_token }}{% if tools is not none %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if 'tool_calls' in message %}{% generation %}{% if message['tool_calls'] | length > 0 %}"
    "{{ message['tool_calls'] | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = PLAIN.replace("message['content']", "message['content'].split('</think>')[-1]")
QUESTION = {"role": "user", "content": "What is 2 plus 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "3"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULT = {"role": "tool", "content": "5"}


def tokenizer_of(template):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = template
    return tokenizer


def rendered(record, template, name="messages"):
    return render(record, "file:3", name, tokenizer_of(template))


def trained(record, template, name="messages"):
    """The texts that train."""
    chat = rendered(record, template, name)
    return [chat.text[start:stop] for start, stop in chat.spans]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, ANSWER], "tools": ADD},
        {"messages": [QUESTION, CALL, RESULT, ANSWER], "tools": ADD},
        {"messages": [QUESTION, CALL | {"content": ""}, RESULT | {"role": "ipython"}, ANSWER]},
        {"messages": [QUESTION, CALL, RESULT | {"content": ""}, ANSWER], "tools": []},
        {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]},
    ],
)
def test_masks_with_tools_are_those_of_transformers(tmp_path, record):
    tokenizer = tokenizer_of(TOOLS.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    tokens = tokenize(str(path), tokenizer, cache=tmp_path)
    tokenizer.chat_template = TOOLS
    expected = tokenizer.apply_chat_template(
        record["messages"],
        tools=record.get("tools") or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert tokens.input_ids.tolist() == expected["input_ids"] and any(tokens.trained)
    assert tokens.trained.tolist() == [bool(value) for value in expected["assistant_masks"]]
    assert "warnings" not in tokens.meta


def test_tools_are_read_wherever_they_are():
    expected = rendered({"messages": [QUESTION, ANSWER], "tools": ADD}, TOOLS).text
    assert json.dumps(ADD) in expected
    for record in [
        {"messages": [QUESTION, ANSWER], "tools": json.dumps(ADD)},
        {"messages": [QUESTION, ANSWER], "tools": [json.dumps(tool) for tool in ADD]},
        {"messages": [QUESTION | {"tools": ADD}, ANSWER]},
        {"messages": [QUESTION | {"tools": ADD}, ANSWER], "tools": json.dumps(ADD)},
    ]:
        assert rendered(record, TOOLS).text == expected
    halves = {"prompt": [QUESTION], "completion": [ANSWER], "tools": ADD}
    assert rendered(halves, TOOLS, "prompt_completion").text == expected
    for tools, problem in [
        ("add", "the field 'tools' is invalid JSON"),
        ({"name": "add"}, "'tools' is no list of objects"),
        ([3], "'tools' is no list of objects"),
    ]:
        with pytest.raises(BadRecord, match=f"file:3: .*{problem}"):
            rendered({"messages": [QUESTION, ANSWER], "tools": tools}, TOOLS)
    with pytest.raises(BadRecord, match="have different tools"):
        rendered({"messages": [QUESTION | {"tools": ADD * 2}, ANSWER], "tools": ADD}, TOOLS)
    with pytest.raises(
        BadRecord, match="'tools' decides the answer, and the chat template does not write it"
    ):
        rendered({"messages": [QUESTION, ANSWER], "tools": ADD}, PLAIN)


def test_a_call_trains_whatever_the_template_expects_beside_it():
    """None as content (DeepSeek's templates), an empty text, or either."""
    call = json.dumps(CALLS)
    as_none = PLAIN.replace(
        "message['content'] }}",
        "(message['tool_calls'] | tojson if message['content'] is none else message['content']) }}",
    )
    as_text = PLAIN.replace("message['content'] }}", "message['content'] + (message.tool_calls | tojson) }}")
    printed = PLAIN.replace(
        "+ message['content'] }}",
        "}}{{ message['content'] }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}",
    )
    keeps_none = transformers.__version__.startswith("4.")  # 5 leaves out what is None
    for template in (TOOLS, printed, *([as_none] if keeps_none else [])):
        for content in ({"content": None}, {"content": ""}, {"content": " \n"}, {}):
            message = {"role": "assistant", "tool_calls": CALLS} | content
            record = {"messages": [QUESTION, message, RESULT, ANSWER]}
            assert trained(
                record, template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
            ) == [call + "</s>", "It is 5.</s>"]
            record["messages"][1] = message | {"tool_calls": call}  # as a JSON text
            assert trained(record, template)[0] == call + "</s>"
    with pytest.raises(BadRecord, match=r"file:3: the chat template fails: .*Undefined"):
        rendered({"messages": [QUESTION, CALL, RESULT, ANSWER]}, as_text)  # fails on the user's message
    for template in (PLAIN, PLAIN.replace("+ message['content']", "~ message['content']")):
        with pytest.raises(BadRecord, match=r"message 1: the chat template does not write .*'add'"):
            rendered({"messages": [QUESTION, CALL, RESULT, ANSWER]}, template)
    for calls, problem in [("no", "invalid JSON"), ([{"function": "add"}], "a function in 'tool_calls'")]:
        with pytest.raises(BadRecord, match=f"message 1: .*{problem}"):
            rendered({"messages": [QUESTION, CALL | {"tool_calls": calls}]}, TOOLS)


def test_arguments_that_the_template_quotes_again_are_a_warning():
    quoted = [{"function": {"name": "add", "arguments": '{"a": 2}'}}]
    chat = rendered({"messages": [QUESTION, CALL | {"tool_calls": quoted}]}, TOOLS)
    assert ["quotes once more" in each for each in chat.warnings] == [True]
    assert not rendered({"messages": [QUESTION, CALL]}, TOOLS).warnings


def test_what_the_template_leaves_out_is_said():
    said = "<think>\nQ1 is easy.\n</think>\n\nA."
    record = {"messages": [QUESTION, {"role": "assistant", "content": said}]}
    assert trained(record, PLAIN) == [said + "</s>"]
    assert not rendered(record, PLAIN.replace("message['content']", "message['content'] | trim")).warnings
    with pytest.raises(BadRecord, match=r"file:3, message 1: .* what the assistant says.*Q1 is easy"):
        rendered(record, THINKING)
    turn = {"role": "assistant", "content": "A.", "reasoning_content": "Q1 is easy."}
    (warning,) = rendered({"messages": [QUESTION, turn]}, PLAIN).warnings
    assert "leaves out, or changes, a part of an answer: its reasoning" in warning
    (warning,) = rendered({"messages": [QUESTION, CALL | {"content": "Let me see."}]}, TOOLS).warnings
    assert warning.endswith("its content")
    (warning,) = rendered({"messages": [QUESTION, CALL | {"content": "Let me see."}]}, PLAIN).warnings
    assert warning.endswith("its call")
    silent = PLAIN.replace("for message in messages", "for message in messages if message.role != 'system'")
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(BadRecord, match=r"message 0: .* what the system says.*Be brief"):
        rendered({"messages": [system, QUESTION, ANSWER]}, silent)
    with pytest.raises(BadRecord, match=r"file:3: the chat has a lone surrogate"):
        rendered({"messages": [QUESTION, CALL | {"tool_calls": [{"name": "\ud800"}]}]}, TOOLS)
    # The reasoning of a turn that is not trained may be left out.
    halves = {"prompt": record["messages"], "completion": [ANSWER]}
    (warning,) = rendered(halves, THINKING, "prompt_completion").warnings
    assert warning.endswith("its content")


def test_a_template_without_an_end_is_a_warning():
    chat = {"messages": [QUESTION, ANSWER]}
    for template, warns in [
        (PLAIN, False),
        (PLAIN + "\n", False),
        (PLAIN.replace("eos_token", "'<pad>\n'"), False),  # another special token, and white space
        (PLAIN.replace("eos_token", "'\n'"), True),
        (PLAIN.replace("eos_token", "'' if loop.last and loop.index > 1 else eos_token"), True),
    ]:
        warnings = rendered(chat, template).warnings
        assert [each.startswith("the chat template writes no end token") for each in warnings] == [
            True
        ] * warns


def test_an_end_that_the_answer_has_already_is_written_once():
    chat = {"messages": [QUESTION, {"role": "assistant", "content": "It is 5.</s>"}]}
    assert trained(chat, PLAIN) == ["It is 5.</s>"]
    assert trained(chat, PLAIN.replace("eos_token", "''")) == ["It is 5.</s>"]


def test_answers_of_weight_0_do_not_train(tmp_path):
    other = {"role": "assistant", "content": "I do not know."}
    record = {"messages": [QUESTION, other | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]}
    assert trained(record, PLAIN) == ["It is 5.</s>"]
    record["messages"][1] = other | {"train": False, "weight": None}
    assert trained(record, PLAIN) == ["It is 5.</s>"]
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    tokenizer = tokenizer_of(PLAIN)
    tokens = tokenize(str(tmp_path / "a.jsonl"), tokenizer, train_on_prompt=True, cache=tmp_path)
    assert tokenizer.decode(tokens.input_ids[~tokens.trained]) == "I do not know.</s>"
    with pytest.raises(BadRecord, match="no message of the assistant with a weight other than 0"):
        rendered({"messages": [QUESTION, ANSWER | {"weight": 0}]}, PLAIN)
    with pytest.raises(BadRecord, match="message 1: 'weight' is 0.5; 0 .not trained. or 1 was expected"):
        rendered({"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, PLAIN)


def test_tools_that_the_template_writes_in_part():
    template = PLAIN.replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% for each in tools %}{{ each.name }}:{{ each.description }}{% endfor %}",
    )
    flat = {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"term": {}}},
    }
    record = {"messages": [QUESTION, ANSWER]}
    assert "a part of the tools" in rendered(record | {"tools": [flat]}, template).warnings[0]
    without = flat | {"parameters": {"type": "object", "properties": {}}}
    assert not rendered(record | {"tools": [without]}, template).warnings
    with pytest.raises(
        BadRecord, match="'tools' decides the answer, and the chat template does not write it"
    ):
        rendered(record | {"tools": [{"type": "function", "function": flat}]}, template)


def test_tools_that_a_message_writes():
    system = {"role": "system", "content": json.dumps(ADD)}
    assert not rendered({"messages": [system, QUESTION, ANSWER], "tools": ADD}, PLAIN).warnings


def test_keys_of_messages_that_are_not_read_are_named():
    chat = rendered({"messages": [QUESTION, ANSWER | {"thought": "Count on.", "id": "7"}]}, PLAIN)
    assert chat.unread == ("thought of a message",)


def test_a_record_that_is_not_to_be_trained_on():
    with pytest.raises(BadRecord, match="'weight' is 0, so it is not to be trained on: leave it out"):
        rendered({"messages": [QUESTION, ANSWER], "weight": 0}, PLAIN)
    assert trained({"messages": [QUESTION, ANSWER | {"loss": False}, QUESTION, ANSWER]}, PLAIN) == [
        ANSWER["content"] + "</s>"
    ]
    with pytest.raises(BadRecord, match="'function_call' is an older form"):
        rendered({"messages": [QUESTION, ANSWER | {"function_call": {"name": "add"}}]}, PLAIN)
