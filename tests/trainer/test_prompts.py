"""Prompts are those of training, which are saved next to the weights; and the tokens that end an answer."""

import json

import pytest
from transformers import AutoTokenizer

from data.formats import format_prompt
from data.tokens import tokenize
from trainer.config_derived import SAMPLE
from trainer.prompts import FILE, PromptFormat, chat_ids, end_tokens, generation_config

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]


def tokenizer_of(chat):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        tokenizer.chat_template = CHATML
    return tokenizer


def as_prompt(record):
    """For --format tests.trainer.test_prompts:as_prompt."""
    return {"instruction": record["q"], "response": record["a"]}


@pytest.mark.parametrize(
    "format_name, record, chat",
    [
        ("dolly", {"instruction": "Who {context}?", "context": "{instruction} so", "response": "I."}, False),
        ("alpaca", {"instruction": "Who?", "input": "", "output": "I."}, False),
        ("tests.trainer.test_prompts:as_prompt", {"q": "Who?", "a": "I."}, False),
        ("prompt_completion", {"prompt": "Who?", "completion": " I."}, False),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
            True,
        ),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "user", "content": "Who?"}],
                "completion": [{"role": "assistant", "content": "I."}],
            },
            True,
        ),
    ],
)
def test_a_question_has_the_tokens_of_training(tmp_path, format_name, record, chat):
    tokenizer = tokenizer_of(chat)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(record))
    tokens = tokenize(str(data), tokenizer, format_name=format_name, cache=tmp_path)
    PromptFormat.of(tokens.meta["prompts"]).write(tmp_path)
    asked = PromptFormat.read(tmp_path, tokenizer)
    ids = asked.encode(tokenizer, record.get("instruction", "Who?"), record.get("context", ""))
    assert (
        ids == tokens.input_ids[~tokens.trained].tolist()[: len(ids)] and not tokens.trained[: len(ids)].any()
    )
    assert tokens.trained[len(ids)]
    assert asked.chat is chat


def test_a_model_of_others_is_asked_by_its_template(tmp_path):
    plain, chat = tokenizer_of(False), tokenizer_of(True)
    assert (
        PromptFormat.read(tmp_path, plain).encode(plain, "a", "b")
        == plain(format_prompt("a", "b"))["input_ids"]
    )
    assert PromptFormat.read(tmp_path, chat).encode(chat, "a") == chat.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    with pytest.raises(ValueError, match="has no chat template"):
        chat_ids(plain, [{"role": "user", "content": "a"}])
    (tmp_path / FILE).write_text(json.dumps({"chat": 1, "prompt": "", "prompt_with_context": ""}))
    with pytest.raises(ValueError, match=f"{FILE} is damaged: chat"):
        PromptFormat.read(tmp_path, plain)


def test_what_ends_an_answer(tmp_path):
    plain, chat = tokenizer_of(False), tokenizer_of(True)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    turn = chat.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(tmp_path, plain, 600) == {2, 7} and end_tokens(tmp_path, chat, 600) == {2, 7, turn}
    assert generation_config(tmp_path, chat, 600) == {"eos_token_id": [2, 7, turn]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9, 900]}))
    assert end_tokens(tmp_path, chat, 600) == {2, 8, 9, turn}
    assert generation_config(tmp_path, chat, 600)["eos_token_id"] == [2, 8, 9, turn]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "no"}))
    with pytest.raises(ValueError, match="eos_token_id is 'no'"):
        end_tokens(tmp_path, plain, 600)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is damaged"):
        end_tokens(tmp_path, plain, 600)
